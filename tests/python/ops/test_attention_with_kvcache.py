"""vivace::attention_with_kvcache: rotate, append, attend and probe in one call."""

import pytest
import torch

from reference.kvcache import attention_with_kvcache
from reference.tolerance import assert_accurate, largest_error

from .cases import HEADS, MASKS, OPS, Case, arrange, assert_lse, cumulative, grid, lse_slack, make_slopes

HEAD_DIMS = (32, 59, 64, 80, 128, 256)


def rotary_tables(case, positions, rotary_dim, dtype):
    angle = torch.rand(positions, rotary_dim // 2) * 6.28
    return angle.cos().to(dtype).to(case.device), angle.sin().to(dtype).to(case.device)


def new_caches(case, rows, capacity, heads_kv, head_dim):
    """Caches full of what no key may touch; fill_caches puts the keys there."""
    shape = (rows, capacity, heads_kv, head_dim)
    return tuple(torch.full(shape, float("nan"), dtype=case.dtype, device=case.device) for _ in range(2))


def paged_table(case, batch, width, page_size):
    """A block table in random order over a few pages more than it needs, and their number."""
    pages = batch * width + 3
    return torch.randperm(pages)[: batch * width].view(batch, width).int().to(case.device), pages


def fill_caches(caches, lengths, case, rows=None, block_table=None):
    """Gives the first lengths[b] keys of each batch entry values."""
    entry = torch.cat([torch.full((n,), b) for b, n in enumerate(lengths)])
    key = torch.cat([torch.arange(n) for n in lengths])
    if block_table is not None:
        page_size = caches[0].shape[1]
        at = block_table.cpu().long()[entry, key // page_size], key % page_size
    else:
        at = entry if rows is None else torch.tensor(rows)[entry], key
    at = tuple(t.to(case.device) for t in at)
    for cache in caches:
        cache[at] = case.randn(len(key), *cache.shape[2:], dtype=cache.dtype)


def check(q, k_cache, v_cache, factor=3.0, probe_rows=0, **options):
    """Runs the operator on clones of the caches; holds every output and both caches against the reference."""
    k_after, v_after = k_cache.clone(), v_cache.clone()
    arguments = dict(options)
    probe = None
    if probe_rows:
        batch = q.shape[0] if options.get("cu_seqlens_q") is None else options["cu_seqlens_q"].numel() - 1
        table = options.get("block_table")
        capacity = k_cache.shape[1] if table is None else k_cache.shape[1] * table.shape[1]
        probe = torch.full((batch, probe_rows, capacity), -7.0, device=q.device)
        arguments["probe"] = probe
    out, lse = OPS.attention_with_kvcache(q, k_after, v_after, **arguments)
    assert out.dtype == q.dtype
    exact = attention_with_kvcache(q, k_cache, v_cache, probe_rows=probe_rows, **options)
    low = attention_with_kvcache(q, k_cache, v_cache, probe_rows=probe_rows, **options, compute=q.dtype)
    assert_accurate(out, exact.out, low.out, factor=factor)
    rotated = options.get("rotary_cos") is not None
    if rotated:  # q and k were rounded to their dtype after the rotation
        assert_accurate(lse, exact.lse, low.lse, factor=factor, atol=torch.finfo(q.dtype).eps, what="lse")
    else:
        assert_lse(lse, exact.lse, lse_slack(options.get("softcap")))
    assert torch.equal(bits(v_after), bits(exact.v_cache)), "v_cache is not the bitwise append"
    if rotated:
        assert torch.equal(k_after.isnan(), exact.k_cache.isnan())
        eps = torch.finfo(q.dtype).eps
        torch.testing.assert_close(
            k_after.double(), exact.k_cache.double(), rtol=eps, atol=4 * torch.finfo(torch.float32).eps, equal_nan=True
        )
    else:
        assert torch.equal(bits(k_after), bits(exact.k_cache)), "k_cache is not the bitwise append"
    if probe is not None:
        assert_accurate(
            probe, exact.probe, low.probe, factor=2.0, atol=2e-3 if options.get("softcap") else 1e-5, what="probe"
        )
        outside = exact.probe == 0
        assert (probe[outside] == 0).all(), "probe must be 0 past the length and where a key is hidden"
    return out, lse


def check_rows(rows, q, k_cache, v_cache, cache_seqlens, cache_batch_idx=None, block_table=None):
    """Runs the operator on the whole batch, and holds the batch entries `rows` against the reference."""
    options = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx, "block_table": block_table}
    out, lse = OPS.attention_with_kvcache(q, k_cache, v_cache, **options)
    assert torch.isfinite(out).all()
    rows = rows.to(q.device)
    some = {name: None if t is None else t[rows] for name, t in options.items()}
    if cache_batch_idx is None and block_table is None:
        some["cache_batch_idx"] = rows.int()
    exact = attention_with_kvcache(q[rows], k_cache, v_cache, **some)
    low = attention_with_kvcache(q[rows], k_cache, v_cache, **some, compute=q.dtype)
    assert_accurate(out[rows], exact.out, low.out, factor=3.0)
    assert_lse(lse[rows], exact.lse, lse_slack(None))
    return out, lse


def bits(t):
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


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


@grid("kvcache_steps", cpu=4, cuda=9, page_size=(None, 16), rotary=(None, 1.0))
def test_token_by_token_equals_one_prefill(case):
    heads, heads_kv, dim, n = 4, 2, 64, 24
    q, k, v = (case.randn(2, n, h, dim) for h in (heads, heads_kv, heads_kv))
    options = {"causal": True, "rotary_interleaved": False}
    if case.rotary:
        options["rotary_cos"], options["rotary_sin"] = rotary_tables(case, 32, dim, torch.float32)
    if case.page_size:
        options["block_table"], pages = paged_table(case, 2, 2, case.page_size)
        shape = (pages, case.page_size)
    else:
        shape = (2, 32)
    whole = new_caches(case, *shape, heads_kv, dim)
    stepped = new_caches(case, *shape, heads_kv, dim)
    expected, expected_lse = OPS.attention_with_kvcache(q, *whole, k, v, case.int32([0, 0]), **options)
    for t in range(n):
        out, lse = OPS.attention_with_kvcache(
            q[:, t : t + 1], *stepped, k[:, t : t + 1], v[:, t : t + 1], case.int32([t, t]), **options
        )
        eps = 2 * max(torch.finfo(case.dtype).eps, 1e-6)
        torch.testing.assert_close(out[:, 0].float(), expected[:, t].float(), rtol=eps, atol=eps)
        torch.testing.assert_close(lse[:, :, 0], expected_lse[:, :, t], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(whole, stepped, strict=True))


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


def test_an_append_past_the_capacity_is_an_error_before_anything_is_written():
    case = Case(device="cpu", dtype=torch.float32)
    caches = new_caches(case, 2, 10, 2, 64)
    before = [c.clone() for c in caches]
    k, v = (case.randn(2, 3, 2, 64) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"row 1 of the cache .*8 keys.* 3 .*capacity.* 10"):
        OPS.attention_with_kvcache(case.randn(2, 3, 4, 64), *caches, k, v, case.int32([0, 8]))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, caches, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16])
def test_an_append_past_the_capacity_writes_nothing_outside_on_cuda(page_size):
    case = Case(device="cuda", dtype=torch.bfloat16)
    capacity, lengths = 32, [30, 32, 4]
    room = [torch.full((8 * capacity, 2, 64), 5.0, dtype=case.dtype, device="cuda") for _ in range(2)]
    options = {}
    if page_size is None:
        caches = [r.view(8, capacity, 2, 64)[2:5] for r in room]
    else:
        options["block_table"] = case.int32([[0, 1], [2, 3], [4, 5]])
        caches = [r.view(16, page_size, 2, 64)[4:10] for r in room]
    k, v = (case.randn(3, 5, 2, 64) for _ in range(2))
    OPS.attention_with_kvcache(case.randn(3, 5, 4, 64), *caches, k, v, case.int32(lengths), causal=True, **options)
    torch.cuda.synchronize()
    for whole, new in zip(room, (k, v), strict=True):
        expected = torch.full_like(whole, 5.0)
        first = expected.view(8, capacity, 2, 64)[2:5]
        for b, n in enumerate(lengths):
            fits = min(5, capacity - n)
            first[b, n : n + fits] = new[b, :fits]
        assert torch.equal(whole, expected)


@grid("kvcache_empty", cpu=3, cuda=6, num_splits=(0, 3))
def test_an_empty_cache_gives_zero_and_minus_infinity(case):
    caches = new_caches(case, 2, 40, 2, 64)
    out, lse = OPS.attention_with_kvcache(
        case.randn(2, 3, 4, 64), *caches, cache_seqlens=case.int32([0, 0]), num_splits=case.num_splits
    )
    assert (out == 0).all() and torch.isneginf(lse).all()


@grid(
    "kvcache_few_queries",
    cpu=12,
    cuda=60,
    seqlen_q=(1, 2, 3, 8, 16, 32),
    cuda_axes={"capacity": (700, 4000)},
    capacity=(300,),
    heads=((4, 4), (8, 2), (12, 2), (16, 1)),
    head_dim=(64, 128, 256),
    mask=("causal", "full"),
    page_size=(None, 16, 64, 128),
    layout=("contiguous", "permuted"),
    num_splits=(0, 0, 5),
)
def test_few_queries_over_rows_of_lengths_that_differ(case):
    (heads, heads_kv), batch, dim, capacity = case.heads, 7, case.head_dim, case.capacity
    n = case.seqlen_q
    lengths = [capacity - n, 0, 1, 17, capacity // 2, capacity - n - 1, 33]
    options = {"cache_seqlens": case.int32(lengths), "num_splits": case.num_splits, **MASKS[case.mask]}
    if case.page_size is not None:
        options["block_table"], pages = paged_table(case, batch, -(-capacity // case.page_size), case.page_size)
        caches = new_caches(case, pages, case.page_size, heads_kv, dim)
    else:
        caches = new_caches(case, batch, capacity, heads_kv, dim)
    caches = [arrange(c, case.layout) for c in caches]
    fill_caches(caches, lengths, case, None, options.get("block_table"))
    options["k"], options["v"] = (case.randn(batch, n, heads_kv, dim) for _ in range(2))
    check(case.randn(batch, n, heads, dim), *caches, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 7])
@pytest.mark.parametrize("heads", [(16, 16), (32, 8)])
def test_a_long_row_beside_short_ones(heads, num_splits):
    case = Case(device="cuda", dtype=torch.bfloat16)
    lengths = [20_000, 5, 300, 0, 1]
    caches = [torch.randn(5, 20_000, heads[1], 64, device="cuda").to(case.dtype) for _ in range(2)]
    options = {"cache_seqlens": case.int32(lengths), "num_splits": num_splits}
    q = case.randn(5, 1, heads[0], 64)
    out, _ = check(q, *caches, **options)
    for _ in range(20):
        assert torch.equal(OPS.attention_with_kvcache(q, *caches, **options)[0], out)


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


@pytest.mark.gpu
def test_many_rows_in_one_batch():
    case = Case(device="cuda", dtype=torch.float16)
    batch = 5000
    caches = [case.randn(64, 40, 2, 64) for _ in range(2)]
    lengths = torch.arange(batch, dtype=torch.int32, device="cuda") % 41
    index = (torch.arange(batch, dtype=torch.int32, device="cuda") * 7) % 64
    q = case.randn(batch, 1, 4, 64)
    chosen, chosen_lse = check_rows(
        torch.arange(0, batch, 37), q, *caches, cache_seqlens=lengths, cache_batch_idx=index
    )
    out, lse = OPS.attention_with_kvcache(q, *caches, cache_seqlens=lengths, cache_batch_idx=index, num_splits=1)
    for rows in torch.arange(batch, device="cuda").split(1000):
        options = {"cache_seqlens": lengths[rows], "cache_batch_idx": index[rows], "num_splits": 1}
        some, some_lse = OPS.attention_with_kvcache(q[rows], *caches, **options)
        assert torch.equal(some, out[rows]) and torch.equal(some_lse, lse[rows])
    eps = torch.finfo(case.dtype).eps  # of values of a few units
    torch.testing.assert_close(chosen.double(), out.double(), rtol=eps, atol=8 * eps)
    assert_lse(chosen_lse, lse, lse_slack(None))


@grid("kvcache_no_batch", cpu=2, cuda=3)
def test_an_empty_batch_gives_empty_outputs(case):
    caches = new_caches(case, 2, 40, 2, 64)
    out, lse = OPS.attention_with_kvcache(case.randn(0, 1, 4, 64), *caches, cache_seqlens=case.int32([]))
    assert out.shape == (0, 1, 4, 64) and lse.shape == (0, 4, 1)


@grid("kvcache_bitwise", cpu=3, cuda=12, num_splits=(0, 1, 4), page_size=(None, 16))
def test_a_hundred_runs_give_the_same_bits(case):
    caches = (
        [case.randn(12, 16, 2, 64) for _ in range(2)]
        if case.page_size
        else [case.randn(2, 96, 2, 64) for _ in range(2)]
    )
    options = {"cache_seqlens": case.int32([90, 31]), "num_splits": case.num_splits}
    if case.page_size:
        options["block_table"] = torch.arange(12, dtype=torch.int32, device=case.device).view(2, 6)
    q = case.randn(2, 1, 4, 64)
    first = OPS.attention_with_kvcache(q, *caches, **options)
    for _ in range(100):
        again = OPS.attention_with_kvcache(q, *caches, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@grid("kvcache_alone", cpu=4, cuda=18, seqlen_q=(1, 5), num_splits=(1, 3))
def test_a_row_alone_gives_the_bits_it_has_in_the_batch(case):
    caches = [case.randn(4, 90, 2, 64) for _ in range(2)]
    lengths = [90, 3, 41, 77]
    q = case.randn(4, case.seqlen_q, 4, 64)
    # On CUDA the keys are otherwise cut into parts of equal work for the whole batch.
    options = {"causal": True, "num_splits": case.num_splits}
    out, lse = OPS.attention_with_kvcache(q, *caches, cache_seqlens=case.int32(lengths), **options)
    for b in range(4):
        alone, alone_lse = OPS.attention_with_kvcache(
            q[b : b + 1],
            *caches,
            cache_seqlens=case.int32(lengths[b : b + 1]),
            cache_batch_idx=case.int32([b]),
            **options,
        )
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])


def captured(step):
    """A CUDA graph of step(), which has run once on another stream, and what the captured call gave."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = step()
    return graph, given


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 4])
def test_a_graph_replays_with_lengths_that_grow(num_splits):
    case = Case(device="cuda", dtype=torch.bfloat16)
    caches = new_caches(case, 3, 600, 2, 64)
    fill_caches(caches, [500, 3, 0], case)
    lengths = case.int32([500, 3, 0])
    q, k, v = (case.randn(3, 1, h, 64) for h in (4, 2, 2))
    cos, sin = rotary_tables(case, 600, 64, torch.float32)
    options = {
        "rotary_cos": cos,
        "rotary_sin": sin,
        "causal": True,
        "rotary_interleaved": False,
        "num_splits": num_splits,
    }

    def step():
        return OPS.attention_with_kvcache(q, *caches, k, v, lengths, **options)

    graph, (out, _) = captured(step)
    for _ in range(5):
        for t in (q, k, v):
            t.copy_(torch.randn_like(t))
        before = [c.clone() for c in caches]
        graph.replay()
        arguments = {"k": k, "v": v, "cache_seqlens": lengths, **options}
        exact = attention_with_kvcache(q, *before, **arguments)
        low = attention_with_kvcache(q, *before, **arguments, compute=q.dtype)
        assert_accurate(out, exact.out, low.out, factor=3.0)
        assert torch.equal(bits(caches[1]), bits(exact.v_cache))
        lengths += 1


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 16), 64), ((32, 8), 128), ((16, 2), 128), ((8, 1), 64)])
def test_more_cache_than_l2_holds(heads, head_dim, page_size):
    case = Case(device="cuda", dtype=torch.bfloat16)
    batch, capacity = 1200 // heads[1], 256
    generator = torch.Generator("cuda").manual_seed(7)
    lengths = torch.randint(0, capacity + 1, (batch,), generator=generator, device="cuda").int()
    lengths[:3] = torch.tensor([capacity, 0, 1])
    options = {"cache_seqlens": lengths}
    shape = (batch, capacity, heads[1], head_dim)
    if page_size is not None:
        width = capacity // page_size
        table = torch.randperm(batch * width, generator=generator, device="cuda").int().view(batch, width)
        shape = (batch * width, page_size, heads[1], head_dim)
        # Entries behind the length are not followed.
        used = torch.arange(width, device="cuda") * page_size < lengths[:, None]
        options["block_table"] = torch.where(used, table, 2**30)
    caches = [torch.randn(shape, generator=generator, device="cuda").to(case.dtype) for _ in range(2)]
    q = case.randn(batch, 1, heads[0], head_dim)
    out, lse = check_rows(torch.cat([torch.arange(3), torch.arange(3, batch, 11)]), q, *caches, **options)
    again, again_lse = OPS.attention_with_kvcache(q, *caches, **options)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [3, 90])  # in L2, and more than it holds
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 16), 64), ((32, 8), 128)])
def test_what_the_kernels_before_write_is_what_is_read(heads, head_dim, page_size, batch):
    # On Hopper the kernel starts before those end, and looks ahead at lengths, rows, pages and keys.
    case = Case(device="cuda", dtype=torch.bfloat16)
    capacity = 256
    lengths = (torch.arange(batch, device="cuda") * 37 % (capacity + 1)).int()
    sources = {"cache_seqlens": lengths}
    shape = (batch, capacity, heads[1], head_dim)
    if page_size is None:
        sources["cache_batch_idx"] = torch.randperm(batch, device="cuda").int()
    else:
        width = capacity // page_size
        sources["block_table"] = torch.randperm(batch * width, device="cuda").int().view(batch, width)
        shape = (batch * width, page_size, heads[1], head_dim)
    keys, values = (torch.randn(shape, device="cuda").to(case.dtype) for _ in range(2))
    q = case.randn(batch, 1, heads[0], head_dim)
    expected, expected_lse = OPS.attention_with_kvcache(q, keys, values, **sources)
    k_cache, v_cache = torch.zeros_like(keys), torch.zeros_like(values)
    options = {name: torch.zeros_like(t) for name, t in sources.items()}

    def step():
        for source, to in ((keys, k_cache), (values, v_cache), *((sources[n], options[n]) for n in sources)):
            torch.add(source, 0, out=to)  # a kernel: a copy would not be one
        return OPS.attention_with_kvcache(q, k_cache, v_cache, **options)

    graph, (out, lse) = captured(step)
    for wrong in (0, -1, 10**9):
        for name, t in options.items():
            t.fill_(wrong if name != "cache_seqlens" else abs(wrong))
        k_cache.fill_(float("nan"))
        v_cache.fill_(float("nan"))
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 32, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "seqlen_q"), [((4, 4), 1), ((4, 4), 4), ((8, 2), 1), ((8, 1), 1), ((6, 2), 2)])
def test_a_probe_beside_few_queries(heads, seqlen_q, head_dim, page_size):
    case = Case(device="cuda", dtype=torch.float16)
    batch, capacity = 3, 512
    options = {"cache_seqlens": case.int32([400, 0, 37])}
    shape = (batch, capacity, heads[1], head_dim)
    if page_size is not None:
        options["block_table"], pages = paged_table(case, batch, capacity // page_size, page_size)
        shape = (pages, page_size, heads[1], head_dim)
    caches = [case.randn(*shape) for _ in range(2)]
    check(case.randn(batch, seqlen_q, heads[0], head_dim), *caches, **options, probe_rows=1, probe_head=1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 1, 5])
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "seqlen_q"), [((4, 4), 1), ((4, 4), 3), ((8, 2), 1), ((8, 1), 1), ((6, 2), 2)])
def test_new_keys_are_appended_and_seen_wherever_they_fall(heads, seqlen_q, head_dim, page_size, num_splits):
    case = Case(device="cuda", dtype=torch.bfloat16)
    capacity = 640
    for seqlen_new in (1, 3, 8, 9):  # the last one by a kernel of its own
        lengths = [0, 31, 127, 255, 400, capacity - seqlen_new]
        options = {"cache_seqlens": case.int32(lengths), "num_splits": num_splits}
        shape = (len(lengths) + 1, capacity)
        if page_size is None:
            rows = [5, 0, 1, 6, 2, 3]
            options["cache_batch_idx"] = case.int32(rows)
        else:
            rows = None
            options["block_table"], pages = paged_table(case, len(lengths), capacity // page_size, page_size)
            shape = (pages, page_size)
        caches = new_caches(case, *shape, heads[1], head_dim)
        fill_caches(caches, lengths, case, rows, options.get("block_table"))
        options["k"], options["v"] = (case.randn(len(lengths), seqlen_new, heads[1], head_dim) for _ in range(2))
        check(case.randn(len(lengths), seqlen_q, heads[0], head_dim), *caches, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(16, 16), (32, 8), (8, 1)])
def test_a_row_alone_gives_its_bits_whatever_the_batch(heads, head_dim):
    case = Case(device="cuda", dtype=torch.bfloat16)
    batch, capacity = 640 // heads[1], 300
    caches = [torch.randn(batch, capacity, heads[1], head_dim, device="cuda").to(case.dtype) for _ in range(2)]
    lengths = (torch.arange(batch, device="cuda") * 37 % (capacity + 1)).int()
    q = case.randn(batch, 1, heads[0], head_dim)
    for num_splits in (1, 2):
        out, lse = OPS.attention_with_kvcache(q, *caches, cache_seqlens=lengths, num_splits=num_splits)
        for b in range(0, batch, batch // 5):
            row = slice(b, b + 1)
            options = {"cache_seqlens": lengths[row], "cache_batch_idx": case.int32([b]), "num_splits": num_splits}
            alone, alone_lse = OPS.attention_with_kvcache(q[row], *caches, **options)
            assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])
