"""What vivace::attention_with_kvcache appends: where it goes, what sees it, and what does not fit."""

import itertools

import pytest
import torch

from reference.kvcache import attention_with_kvcache
from reference.tolerance import assert_accurate

from .cases import OPS, Case, assert_lse, grid, lse_slack
from .kvcache_cases import bits, check, fill_caches, new_caches, paged_table, rotary_tables


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


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_new", "causal"),
    [(1, 1, False), (1, 3, False), (2, 9, False), (4, 4, True), (40, 40, True), (130, 130, True)],
)
def test_keys_past_the_capacity_are_neither_written_nor_seen(target, dtype, page_size, seqlen_q, seqlen_new, causal):
    """On the CPU, where such a call is an error, what it should give comes from calls that each read what fits."""
    case = Case(device=target, dtype=dtype)
    capacity, lengths = 32, [30, 32, 4, 33]
    fits = [max(0, min(seqlen_new, capacity - n)) for n in lengths]
    options, shape = {}, (4, capacity)
    if page_size is not None:
        options["block_table"], pages = paged_table(case, 4, capacity // page_size, page_size)
        shape = (pages, page_size)
    caches = new_caches(case, *shape, 2, 64)
    fill_caches(caches, [min(n, capacity) for n in lengths], case, None, options.get("block_table"))
    q, k, v = (case.randn(4, n, h, 64) for n, h in ((seqlen_q, 4), (seqlen_new, 2), (seqlen_new, 2)))
    after = [c.clone() for c in caches]
    for cache, new in zip(after, (k, v), strict=True):
        for b, n in enumerate(lengths):
            for t in range(fits[b]):
                page, row = divmod(n + t, page_size or capacity)
                cache[options["block_table"][b, page] if page_size else b, row] = new[b, t]

    def seen(i):
        """Keys of each row that query i sees: those up to its own place in the longer sequence, as far as they are."""
        behind = seqlen_q - 1 - i if causal else 0
        return [min(capacity, n + seqlen_new - behind) for n in lengths]

    out, lse = torch.empty_like(q), torch.empty(4, 4, seqlen_q, device=target)
    exact, low = (torch.empty(q.shape, dtype=t, device=target) for t in (torch.float64, dtype))
    exact_lse = torch.empty_like(lse, dtype=torch.float64)
    for keys, group in itertools.groupby(range(seqlen_q), seen):
        i = list(group)
        arguments = q[:, i], *after
        options["cache_seqlens"] = case.int32(keys)
        exact[:, i], exact_lse[:, :, i] = attention_with_kvcache(*arguments, **options)[:2]
        low[:, i] = attention_with_kvcache(*arguments, **options, compute=dtype).out
        if target == "cpu":
            out[:, i], lse[:, :, i] = OPS.attention_with_kvcache(*arguments, **options)
    if target != "cpu":
        options["cache_seqlens"] = case.int32(lengths)
        out, lse = OPS.attention_with_kvcache(q, *caches, k, v, **options, causal=causal)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(caches, after, strict=True))
    assert_accurate(out, exact, low, factor=3.0)
    assert_lse(lse, exact_lse, lse_slack(None))
