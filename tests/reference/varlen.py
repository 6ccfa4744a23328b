"""Attention over sequences of different lengths: the dense reference, one sequence at a time."""

from itertools import pairwise

import torch

from .attention import attention, softmax_dtype


def gather_pages(pages, table, length):
    """The first ``length`` rows of one sequence: row j is row j % page_size of page table[j // page_size]."""
    j = torch.arange(length, device=pages.device)
    return pages[table.long()[j // pages.shape[1]], j % pages.shape[1]]


def lengths_of(cu_seqlens, seqused):
    starts = cu_seqlens.tolist()
    allotted = [end - start for start, end in pairwise(starts)]
    return starts, allotted if seqused is None else seqused.tolist()


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    block_table=None,
    alibi_slopes=None,
    *,
    compute=torch.float64,
    **options,
):
    """q (total_q, heads, d); k, v (total_k, heads_kv, ...) or pages. out (total_q, heads, dv), lse (heads, total_q).

    Rows of q past seqused_q are 0 and -inf here; the operator leaves them unspecified.
    """
    starts_q, lengths_q = lengths_of(cu_seqlens_q, seqused_q)
    starts_k, lengths_k = lengths_of(cu_seqlens_k, seqused_k)
    total_q, heads, _ = q.shape
    out = torch.zeros(total_q, heads, v.shape[-1], dtype=compute, device=q.device)
    lse = torch.full((heads, total_q), -torch.inf, dtype=softmax_dtype(compute), device=q.device)
    for b, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows = slice(starts_q[b], starts_q[b] + n_q)
        if block_table is None:
            keys, values = (t[starts_k[b] : starts_k[b] + n_k] for t in (k, v))
        else:
            keys, values = (gather_pages(t, block_table[b], n_k) for t in (k, v))
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        rows_out, rows_lse = attention(
            q[rows][None], keys[None], values[None], alibi_slopes=slopes, batch_index=b, compute=compute, **options
        )
        index = (torch.arange(rows.start, rows.stop, device=q.device),)
        out = out.index_put(index, rows_out[0])
        lse = lse.T.index_put(index, rows_lse[0].T).T
    return out, lse
