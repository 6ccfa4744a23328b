"""Attention over a KV cache: rotate, append, attend, probe; the dense reference, one sequence at a time."""

from typing import NamedTuple

import torch

from .attention import attention, softmax_dtype
from .rotary import rotary_embedding


class CacheResult(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    k_cache: torch.Tensor  # after the append, in the cache's dtype
    v_cache: torch.Tensor
    probe: torch.Tensor | None  # (batch, probe_rows, capacity)


def attention_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    cache_seqlens=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    cu_seqlens_q=None,
    max_seqlen_q=0,
    softmax_scale=None,
    causal=False,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    rotary_interleaved=True,
    num_splits=0,
    probe_rows=0,
    probe_head=-1,
    *,
    compute=torch.float64,
):
    """The operator's arguments, without the tensors that it writes: those come back as a CacheResult."""
    ragged = cu_seqlens_q is not None
    if ragged:
        bounds = cu_seqlens_q.tolist()
        batch = len(bounds) - 1
    else:
        batch, seqlen_q = q.shape[:2]
        bounds = [b * seqlen_q for b in range(batch + 1)]
    flat = {name: None if t is None else t.reshape(-1, *t.shape[-2:]) for name, t in (("q", q), ("k", k), ("v", v))}
    if k is not None and not ragged:  # the append's length may differ from q's
        seqlen_new = k.shape[1]
        bounds_new = [b * seqlen_new for b in range(batch + 1)]
    else:
        bounds_new = bounds
    row_of = list(range(batch)) if cache_batch_idx is None else cache_batch_idx.tolist()
    page_size = k_cache.shape[1]
    capacity = page_size * block_table.shape[1] if block_table is not None else k_cache.shape[1]
    lengths = [capacity] * batch if cache_seqlens is None else cache_seqlens.tolist()
    pads = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    k_after, v_after = k_cache.clone(), v_cache.clone()
    heads, dim_v = q.shape[-2], v_cache.shape[-1]
    out = torch.zeros(bounds[-1], heads, dim_v, dtype=compute, device=q.device)
    lse = torch.full((heads, bounds[-1]), -torch.inf, dtype=softmax_dtype(compute), device=q.device)
    probe = (
        torch.zeros(batch, probe_rows, capacity, dtype=softmax_dtype(compute), device=q.device) if probe_rows else None
    )

    def places(b, start, end):
        """Where keys [start, end) of batch entry b lie: rows or pages, rows within them."""
        j = torch.arange(start, end, device=k_cache.device)
        if block_table is None:
            return torch.full_like(j, row_of[b]), j
        return block_table[b].long()[j // page_size], j % page_size

    for b in range(batch):
        rows = slice(bounds[b], bounds[b + 1])
        n_q = rows.stop - rows.start
        before = lengths[b]
        query = flat["q"][rows].to(compute)
        keys = k_cache[places(b, 0, before)].to(compute)
        values = v_cache[places(b, 0, before)].to(compute)
        if rotary_cos is not None:
            at = torch.full((n_q,), before, device=q.device)
            if causal or window_left >= 0 or window_right >= 0:
                at = at + torch.arange(n_q, device=q.device)
            query = rotary_embedding(query, rotary_cos, rotary_sin, at, rotary_interleaved, compute=compute)
        if k is not None:
            new = slice(bounds_new[b], bounds_new[b + 1])
            k_new, v_new = flat["k"][new], flat["v"][new]
            if rotary_cos is not None:
                at = before + torch.arange(new.stop - new.start, device=q.device)
                k_new = rotary_embedding(k_new, rotary_cos, rotary_sin, at, rotary_interleaved, compute=compute)
            at = places(b, before, before + new.stop - new.start)
            k_after[at] = k_new.to(k_cache.dtype)
            v_after[at] = v_new
            keys = torch.cat([keys, k_new.to(compute)])
            values = torch.cat([values, v_new.to(compute)])
        # A padding on the left shortens the sequence at its front: positions relative to its end stay.
        pad = min(pads[b], keys.shape[0])
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        rows_out, rows_lse, p = attention(
            query[None],
            keys[None, pad:],
            values[None, pad:],
            softmax_scale=softmax_scale,
            causal=causal,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            return_probs=True,
            compute=compute,
        )
        out[rows] = rows_out[0]
        lse[:, rows] = rows_lse[0]
        if probe is not None:
            last = min(probe_rows, n_q)
            probe[b, probe_rows - last :, pad : keys.shape[0]] = p[0, probe_head, n_q - last :]
    if not ragged:
        out = out.view(batch, -1, heads, dim_v) if bounds[-1] else out.view(batch, seqlen_q, heads, dim_v)
        lse = lse.view(heads, batch, seqlen_q).transpose(0, 1)
    return CacheResult(out, lse, k_after, v_after, probe)
