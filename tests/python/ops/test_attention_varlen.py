"""vivace::attention_varlen: sequences of different lengths beside each other, or in pages."""

import pytest
import torch

from reference.tolerance import assert_accurate, largest_error
from reference.varlen import attention_varlen

from .cases import HEAD_DIMS, HEADS, MASKS, OPS, arrange, assert_lse, cumulative, grid, lse_slack, make_slopes

RAGGED = (
    ((5, 130, 1, 64), (17, 201, 33, 64)),
    ((0, 40, 3), (12, 0, 90)),
    ((1, 1, 1, 1), (147, 3, 0, 65)),
    ((70, 20), (30, 100)),
    ((0, 0, 7), (0, 5, 7)),
    ((129,), (257,)),
)
LONG_RAGGED = (*RAGGED, ((512, 1, 300), (1024, 799, 257)), ((1023, 4), (512, 2048)))


def check(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    out, lse = OPS.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options)
    assert out.dtype == q.dtype
    exact, exact_lse = attention_varlen(q, k, v, cu_q, cu_k, **options)
    low, _ = attention_varlen(q, k, v, cu_q, cu_k, **options, compute=q.dtype)
    used = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    if options.get("seqused_q") is not None:  # rows past it are unspecified
        for start, end, n in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), options["seqused_q"].tolist(), strict=True):
            used[start + n : end] = False
    assert_accurate(out[used], exact[used], low[used])
    assert_lse(lse[:, used], exact_lse[:, used], lse_slack(options.get("softcap")))
    return out, lse


@grid(
    "varlen",
    cpu=90,
    cuda=180,
    cuda_axes={"lengths": LONG_RAGGED},
    lengths=RAGGED,
    heads=HEADS,
    head_dim=HEAD_DIMS,
    mask=MASKS,
    softcap=(0.0, 0.0, 20.0),
    slopes=(None, None, "heads", "batch"),
    sinks=(False, False, True),
    layout=("contiguous", "permuted", "packed", "unaligned", "sliced_heads"),
    used=(False, False, True),
)
def test_varlen_equals_the_reference(case):
    (lengths_q, lengths_k), (heads, heads_kv) = case.lengths, case.heads
    cu_q, cu_k = cumulative(lengths_q, case.device), cumulative(lengths_k, case.device)
    q = arrange(case.randn(sum(lengths_q), heads, case.head_dim), case.layout)
    k, v = (arrange(case.randn(sum(lengths_k), heads_kv, case.head_dim), case.layout) for _ in range(2))
    used = {}
    if case.used:
        used = {
            "seqused_q": case.int32([n - n // 3 for n in lengths_q]),
            "seqused_k": case.int32([n - n // 4 for n in lengths_k]),
        }
    check(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max(lengths_q),
        max(lengths_k),
        **used,
        **MASKS[case.mask],
        softcap=case.softcap,
        alibi_slopes=make_slopes(case, case.slopes, len(lengths_q), heads),
        sinks=torch.randn(heads).to(case.device) if case.sinks else None,
    )


@grid(
    "varlen_paged",
    cpu=36,
    cuda=90,
    page_size=(1, 16, 256, 7),
    heads=HEADS,
    head_dim=(64, 128, 40, 96),
    mask=MASKS,
    lengths=(((5, 130, 1), (17, 301, 33)), ((1, 1, 1), (147, 0, 65)), ((0, 20, 64), (5, 20, 600))),
    by=("cu_seqlens_k", "seqused_k"),
    softcap=(0.0, 20.0),
)
def test_paged_keys_equal_the_reference(case):
    (lengths_q, lengths_k), (heads, heads_kv) = case.lengths, case.heads
    table_width = max(-(-n // case.page_size) for n in lengths_k) + 1
    pages = table_width * len(lengths_k) + 3
    table = (
        torch.randperm(pages)[: table_width * len(lengths_k)].view(len(lengths_k), table_width).int().to(case.device)
    )
    q = case.randn(sum(lengths_q), heads, case.head_dim)
    k, v = (case.randn(pages, case.page_size, heads_kv, case.head_dim) for _ in range(2))
    key = torch.arange(table_width * case.page_size)
    for b, n in enumerate(lengths_k):  # what no key may touch
        page = table.cpu().long()[b, key // case.page_size]
        for t in (k, v):
            t[page[n:].to(case.device), (key % case.page_size)[n:].to(case.device)] = float("nan")
    cu_q, cu_k = cumulative(lengths_q, case.device), cumulative(lengths_k, case.device)
    options = {"block_table": table, "softcap": case.softcap, **MASKS[case.mask]}
    if case.by == "seqused_k":
        options["seqused_k"] = case.int32(lengths_k)
    out, _ = check(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), **options)
    assert torch.isfinite(out).all()


@grid("varlen_dropout", cpu=6, cuda=12, p=(0.17, 0.5), mask=("full", "causal"))
def test_dropout_counts_positions_within_a_sequence(case):
    lengths_q, lengths_k = (33, 64, 0, 20), (50, 64, 9, 133)
    q, k, v = (case.randn(sum(n), h, 64) for n, h in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2)))
    check(
        q,
        k,
        v,
        cumulative(lengths_q, case.device),
        cumulative(lengths_k, case.device),
        64,
        133,
        **MASKS[case.mask],
        dropout_p=case.p,
        rng_state=torch.tensor([-5, 1 << 20], device=case.device),
    )


@grid("varlen_dense", cpu=6, cuda=12, mask=MASKS, lengths=((40, 77), (1, 130)))
def test_equal_lengths_give_what_dense_attention_gives(case):
    seqlen_q, seqlen_k = case.lengths
    q, k, v = (case.randn(3, s, h, 64) for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
    dense, dense_lse = OPS.attention(q, k, v, **MASKS[case.mask])
    out, lse = OPS.attention_varlen(
        *(t.flatten(0, 1) for t in (q, k, v)),
        cumulative([seqlen_q] * 3, case.device),
        cumulative([seqlen_k] * 3, case.device),
        seqlen_q,
        seqlen_k,
        **MASKS[case.mask],
    )
    eps = max(torch.finfo(case.dtype).eps, 1e-6)
    torch.testing.assert_close(out.view_as(dense).float(), dense.float(), rtol=2 * eps, atol=eps)
    torch.testing.assert_close(lse.view(4, 3, seqlen_q).transpose(0, 1), dense_lse, rtol=1e-5, atol=1e-5)


@grid("varlen_containment", cpu=3, cuda=9)
def test_a_sequence_full_of_nan_leaves_its_neighbours_alone(case):
    lengths_q, lengths_k = (40, 30, 50), (70, 65, 40)
    q, k, v = (case.randn(sum(n), 4, 64) for n in (lengths_q, lengths_k, lengths_k))
    arguments = (cumulative(lengths_q, case.device), cumulative(lengths_k, case.device), 50, 70)
    clean, _ = OPS.attention_varlen(q, k, v, *arguments, causal=True)
    k[70:135], v[70:135] = float("nan"), float("inf")
    out, _ = OPS.attention_varlen(q, k, v, *arguments, causal=True)
    assert largest_error(out[:40], clean[:40]) == 0 and largest_error(out[70:], clean[70:]) == 0
    assert not torch.isfinite(out[40:70]).any()


@grid("varlen_alone", cpu=3, cuda=9, mask=("full", "causal"))
def test_a_sequence_alone_gives_the_bits_it_has_in_the_batch(case):
    lengths_q, lengths_k = (40, 1, 50), (70, 65, 140)
    q, k, v = (case.randn(sum(n), 4, 64) for n in (lengths_q, lengths_k, lengths_k))
    cu_q, cu_k = cumulative(lengths_q, case.device), cumulative(lengths_k, case.device)
    out, lse = OPS.attention_varlen(q, k, v, cu_q, cu_k, 50, 140, **MASKS[case.mask])
    for b in range(3):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        alone, alone_lse = OPS.attention_varlen(
            q[rows],
            k[keys],
            v[keys],
            cumulative(lengths_q[b : b + 1], case.device),
            cumulative(lengths_k[b : b + 1], case.device),
            50,
            140,
            **MASKS[case.mask],
        )
        assert torch.equal(alone, out[rows]) and torch.equal(alone_lse, lse[:, rows])


@grid("varlen_bitwise", cpu=2, cuda=6)
def test_a_hundred_runs_give_the_same_bits(case):
    q, k, v = (case.randn(n, 4, 64) for n in (120, 300, 300))
    arguments = (cumulative((50, 70), case.device), cumulative((100, 200), case.device), 70, 200)
    first = OPS.attention_varlen(q, k, v, *arguments, causal=True)
    for _ in range(100):
        again = OPS.attention_varlen(q, k, v, *arguments, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@grid("varlen_none", cpu=2, cuda=3)
def test_a_batch_of_no_sequences_gives_nothing(case):
    q, k, v = (case.randn(0, h, 64) for h in (4, 2, 2))
    nothing = cumulative((), case.device)
    out, lse = OPS.attention_varlen(q, k, v, nothing, nothing, 0, 0)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


@pytest.mark.gpu
def test_lengths_may_change_between_replays_of_a_graph():
    q = torch.randn(3, 4, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(600, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cu_q, cu_k = cumulative((1, 1, 1), "cuda"), cumulative((200, 200, 200), "cuda")
    OPS.attention_varlen(q, k, v, cu_q, cu_k, 1, 600)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = OPS.attention_varlen(q, k, v, cu_q, cu_k, 1, 600)
    for lengths in ((200, 200, 200), (1, 0, 599), (300, 20, 250)):
        cu_k.copy_(cumulative(lengths))
        graph.replay()
        exact, _ = attention_varlen(q, k, v, cu_q, cu_k)
        low, _ = attention_varlen(q, k, v, cu_q, cu_k, compute=q.dtype)
        assert_accurate(out, exact, low)
