"""What the tests of vivace::attention_with_kvcache share: caches, block tables, calls held against the reference."""

import torch

from reference.kvcache import attention_with_kvcache
from reference.tolerance import assert_accurate

from .cases import OPS, assert_lse, lse_slack


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
