"""vivace::attention_with_kvcache: rotate, append, attend and probe in one call."""

import pytest
import torch

from reference.tolerance import largest_error

from .cases import HEADS, MASKS, OPS, Case, arrange, cumulative, grid, make_slopes
from .kvcache_cases import check, fill_caches, new_caches, paged_table, rotary_tables

HEAD_DIMS = (32, 59, 64, 80, 128, 256)


@grid(
    "kvcache",
    cpu=100,
    cuda=200,
    lengths=((1, 130), (1, 40), (3, 90), (17, 64), (5, 7), (40, 203)),
    cuda_axes={"lengths": ((1, 130), (1, 1024), (3, 799), (64, 256), (5, 7), (1, 339), (128, 128), (64, 800))},
    append=(True, True, False),
    heads=HEADS,
    head_dim=HEAD_DIMS,
    mask=MASKS,
    softcap=(0.0, 0.0, 20.0),
    slopes=(None, None, "heads", "batch"),
    sinks=(False, False, True),
    rotary=(None, None, 0.5, 1.0),
    interleaved=(True, False),
    page_size=(None, None, 1, 16, 256),
    extra=(None, None, "batch_idx", "leftpad", "both"),
    num_splits=(0, 1, 3),
    layout=("contiguous", "permuted", "packed", "unaligned"),
)
def test_kvcache_equals_the_reference(case):
    (seqlen_q, capacity), (heads, heads_kv), batch, dim = case.lengths, case.heads, 3, case.head_dim
    capacity += seqlen_q
    lengths = [capacity - seqlen_q, 0, (capacity - seqlen_q) // 2]
    options = {"cache_seqlens": case.int32(lengths), "num_splits": case.num_splits, **MASKS[case.mask]}
    rows = None
    if case.page_size is not None:
        width = -(-capacity // case.page_size)
        options["block_table"], pages = paged_table(case, batch, width, case.page_size)
        caches = new_caches(case, pages, case.page_size, heads_kv, dim)
    else:
        if case.extra in ("batch_idx", "both"):
            rows = [4, 0, 3]
            options["cache_batch_idx"] = case.int32(rows)
        if case.extra in ("leftpad", "both"):
            options["cache_leftpad"] = case.int32([n // 3 for n in lengths])
        caches = new_caches(case, 5, capacity, heads_kv, dim)
    caches = [arrange(c, case.layout) for c in caches]
    fill_caches(caches, lengths, case, rows, options.get("block_table"))
    q = arrange(case.randn(batch, seqlen_q, heads, dim), case.layout)
    if case.append:
        options["k"], options["v"] = (
            arrange(case.randn(batch, seqlen_q, heads_kv, dim), case.layout) for _ in range(2)
        )
        if case.rotary is not None:
            rotary_dim = max(2, int(dim * case.rotary) // 2 * 2)
            table_dtype = torch.float32 if case.interleaved else case.dtype
            tables = rotary_tables(case, capacity + 3, rotary_dim, table_dtype)
            options["rotary_cos"], options["rotary_sin"] = tables
            options["rotary_interleaved"] = case.interleaved
    check(
        q,
        *caches,
        **options,
        softcap=case.softcap,
        alibi_slopes=make_slopes(case, case.slopes, batch, heads),
        sinks=torch.randn(heads).to(case.device) if case.sinks else None,
    )


@grid(
    "kvcache_ragged",
    cpu=30,
    cuda=60,
    lengths=(((5, 1, 30, 1), (0, 130, 17, 64)), ((1, 1, 1, 1), (3, 0, 200, 77)), ((64, 0, 2, 33), (1, 9, 0, 90))),
    append=(True, True, False),
    heads=HEADS,
    head_dim=(64, 128, 40),
    mask=("causal", "causal", "full", "causal_left"),
    rotary=(None, 1.0),
    page_size=(None, 1, 16, 256),
    batch_idx=(False, True),
    num_splits=(0, 1, 3),
    probe_rows=(0, 0, 1),
)
def test_ragged_queries_append_and_attend_at_their_own_lengths(case):
    (lengths_q, lengths), (heads, heads_kv), dim = case.lengths, case.heads, case.head_dim
    batch, capacity = 4, max(a + b for a, b in zip(lengths_q, lengths, strict=True)) + 2
    options = {
        "cache_seqlens": case.int32(lengths),
        "cu_seqlens_q": cumulative(lengths_q, case.device),
        "max_seqlen_q": max(lengths_q),
        "num_splits": case.num_splits,
        **MASKS[case.mask],
    }
    rows = None
    if case.page_size is not None:
        options["block_table"], pages = paged_table(case, batch, -(-capacity // case.page_size), case.page_size)
        caches = new_caches(case, pages, case.page_size, heads_kv, dim)
    else:
        caches = new_caches(case, 6, capacity, heads_kv, dim)
        if case.batch_idx:
            rows = [5, 2, 0, 1]
            options["cache_batch_idx"] = case.int32(rows)
    fill_caches(caches, lengths, case, rows, options.get("block_table"))
    if case.append:
        options["k"], options["v"] = (case.randn(sum(lengths_q), heads_kv, dim) for _ in range(2))
        if case.rotary is not None:
            options["rotary_cos"], options["rotary_sin"] = rotary_tables(case, capacity, dim, torch.float32)
            options["rotary_interleaved"] = False
    probe_head = heads - 1 if case.probe_rows else -1
    # A row without queries has nothing to probe.
    probe_rows = case.probe_rows if min(lengths_q) >= case.probe_rows else 0
    check(
        case.randn(sum(lengths_q), heads, dim),
        *caches,
        **options,
        probe_rows=probe_rows,
        probe_head=probe_head if probe_rows else -1,
    )


@grid(
    "kvcache_probe",
    cpu=16,
    cuda=36,
    seqlen_q=(1, 3, 20),
    probe_rows=(1, 3),
    heads=((4, 4), (6, 2), (8, 1)),
    mask=("causal", "full", "causal_left"),
    page_size=(None, 16),
    sinks=(False, True),
    softcap=(0.0, 20.0),
    leftpad=(False, True),
    num_splits=(0, 1, 3),
)
def test_probe_holds_one_heads_probabilities(case):
    (heads, heads_kv), batch, capacity = case.heads, 3, 90
    lengths = [60, 0, 33]
    options = {
        "cache_seqlens": case.int32(lengths),
        "num_splits": case.num_splits,
        **MASKS[case.mask],
        "softcap": case.softcap,
    }
    if case.page_size is not None:
        options["block_table"], pages = paged_table(case, batch, -(-capacity // case.page_size), case.page_size)
        caches = new_caches(case, pages, case.page_size, heads_kv, 64)
    else:
        caches = new_caches(case, batch, capacity, heads_kv, 64)
        if case.leftpad:
            options["cache_leftpad"] = case.int32([20, 0, 5])
    fill_caches(caches, lengths, case, None, options.get("block_table"))
    options["k"], options["v"] = (case.randn(batch, case.seqlen_q, heads_kv, 64) for _ in range(2))
    check(
        case.randn(batch, case.seqlen_q, heads, 64),
        *caches,
        **options,
        sinks=torch.randn(heads).to(case.device) if case.sinks else None,
        probe_rows=min(case.probe_rows, case.seqlen_q),
        probe_head=heads // 2,
    )


@grid("kvcache_whole", cpu=3, cuda=6, seqlen_q=(1, 9))
def test_without_lengths_the_whole_cache_is_read(case):
    check(case.randn(2, case.seqlen_q, 4, 64), *(case.randn(2, 50, 2, 64) for _ in range(2)), causal=True)


@grid("kvcache_twice", cpu=3, cuda=6)
def test_a_cache_row_may_be_read_by_several_batch_entries(case):
    caches = [case.randn(3, 50, 2, 64) for _ in range(2)]
    options = {"cache_seqlens": case.int32([50, 7, 50, 20]), "cache_batch_idx": case.int32([1, 1, 0, 1])}
    check(case.randn(4, 1, 4, 64), *caches, **options)


@grid("kvcache_outside", cpu=3, cuda=9, page_size=(None, 16), num_splits=(0, 3), seqlen_q=(1, 30))
def test_what_lies_beyond_the_length_is_never_read(case):
    lengths = [70, 5]
    options = {"cache_seqlens": case.int32(lengths), "num_splits": case.num_splits}
    if case.page_size:
        options["block_table"], pages = paged_table(case, 2, 6, case.page_size)
        caches = new_caches(case, pages, case.page_size, 2, 64)
    else:
        caches = new_caches(case, 2, 96, 2, 64)
    fill_caches(caches, lengths, case, None, options.get("block_table"))
    q = case.randn(2, case.seqlen_q, 4, 64)
    out, lse = OPS.attention_with_kvcache(q, *caches, **options)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    zeros = [torch.nan_to_num(c, nan=0.0) for c in caches]
    again, _ = OPS.attention_with_kvcache(q, *zeros, **options)
    assert torch.equal(out, again)


@grid("kvcache_containment", cpu=3, cuda=9, num_splits=(0, 3))
def test_a_row_full_of_nan_leaves_the_other_rows_alone(case):
    caches = [case.randn(3, 80, 2, 64) for _ in range(2)]
    options = {"cache_seqlens": case.int32([80, 40, 80]), "num_splits": case.num_splits, "causal": True}
    q = case.randn(3, 2, 4, 64)
    clean, _ = OPS.attention_with_kvcache(q, *caches, **options)
    caches[0][1], caches[1][1] = float("nan"), float("inf")
    out, _ = OPS.attention_with_kvcache(q, *caches, **options)
    assert largest_error(out[[0, 2]], clean[[0, 2]]) == 0
    assert not torch.isfinite(out[1]).any()


@grid("kvcache_empty", cpu=3, cuda=6, num_splits=(0, 3))
def test_an_empty_cache_gives_zero_and_minus_infinity(case):
    caches = new_caches(case, 2, 40, 2, 64)
    out, lse = OPS.attention_with_kvcache(
        case.randn(2, 3, 4, 64), *caches, cache_seqlens=case.int32([0, 0]), num_splits=case.num_splits
    )
    assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_a_batch_entry_without_a_cache_row_gives_zero(seqlen_q):
    case = Case(device="cuda", dtype=torch.bfloat16)
    caches = [case.randn(3, 200, 2, 64) for _ in range(2)]
    before = [c.clone() for c in caches]
    q, k, v = (case.randn(3, seqlen_q, h, 64) for h in (4, 2, 2))
    lengths = case.int32([100, 150, 7])
    out, lse = OPS.attention_with_kvcache(q, *caches, k, v, lengths, cache_batch_idx=case.int32([2, -1, 0]))
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[[0, 2]]).all()
    assert torch.equal(caches[0][1], before[0][1])


@grid("kvcache_no_batch", cpu=2, cuda=3)
def test_an_empty_batch_gives_empty_outputs(case):
    caches = new_caches(case, 2, 40, 2, 64)
    out, lse = OPS.attention_with_kvcache(case.randn(0, 1, 4, 64), *caches, cache_seqlens=case.int32([]))
    assert out.shape == (0, 1, 4, 64) and lse.shape == (0, 4, 1)
