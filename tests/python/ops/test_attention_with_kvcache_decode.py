"""vivace::attention_with_kvcache with few queries: many rows, long rows, captured graphs, and the same bits again."""

import pytest
import torch

from reference.kvcache import attention_with_kvcache
from reference.tolerance import assert_accurate

from .cases import MASKS, OPS, Case, arrange, assert_lse, cumulative, grid, lse_slack
from .kvcache_cases import bits, check, check_rows, fill_caches, new_caches, paged_table, rotary_tables


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


@grid(
    "kvcache_many_entries",
    cpu=6,
    cuda=24,
    batch=(257, 600),
    lengths_q=((1,), (2,), (1, 3, 2)),
    mask=("causal_left", "left", "both"),
    heads=((4, 4), (6, 2)),
    head_dim=(64, 128),
    extra=(None, "softcap", "leftpad", "sinks"),
    page_size=(None, 16),
    num_splits=(0, 3),
    probe_rows=(0, 1),
)
def test_more_entries_than_a_launch_has_room_for(case):
    # None of these is the plain call, whose kernel has no such limit (256).
    (heads, heads_kv), batch, capacity, dim = case.heads, case.batch, 64, case.head_dim
    lengths_q = [case.lengths_q[b % len(case.lengths_q)] for b in range(batch)]
    lengths = [b * 11 % 61 for b in range(batch)]
    options = {"cache_seqlens": case.int32(lengths), "num_splits": case.num_splits, **MASKS[case.mask]}
    rows = None
    if case.page_size is not None:
        options["block_table"], pages = paged_table(case, batch, capacity // case.page_size, case.page_size)
        caches = new_caches(case, pages, case.page_size, heads_kv, dim)
    else:
        rows = torch.randperm(batch).tolist()
        options["cache_batch_idx"] = case.int32(rows)
        caches = new_caches(case, batch, capacity, heads_kv, dim)
        if case.extra == "leftpad":
            options["cache_leftpad"] = case.int32([n // 3 for n in lengths])
    fill_caches(caches, lengths, case, rows, options.get("block_table"))
    packed = len(case.lengths_q) > 1
    if packed:
        options["cu_seqlens_q"] = cumulative(lengths_q, case.device)
        options["max_seqlen_q"] = max(lengths_q)
    shape = (sum(lengths_q),) if packed else (batch, lengths_q[0])
    options["k"], options["v"] = (case.randn(*shape, heads_kv, dim) for _ in range(2))
    check(
        case.randn(*shape, heads, dim),
        *caches,
        **options,
        softcap=20.0 if case.extra == "softcap" else 0.0,
        sinks=torch.randn(heads).to(case.device) if case.extra == "sinks" else None,
        probe_rows=case.probe_rows,
        probe_head=heads // 2 if case.probe_rows else -1,
    )


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
