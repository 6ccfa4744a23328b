"""S_dmask, what flash-attn returns for its tests with dropout: the probabilities, negative where they were dropped."""

import torch
import torch.nn.functional as F

from vivace import recompute

_MULTIPLE = 128


def s_dmask(q, k, lse, softmax_scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state):
    """q's dtype, (batch, heads, seqlen_q, seqlen_k) with both lengths rounded up to 128. Its scaling is the
    softmax's.
    """
    signed = _signed(q, k, lse, softmax_scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state)
    return F.pad(signed, (0, -k.shape[1] % _MULTIPLE, 0, -q.shape[1] % _MULTIPLE))


def s_dmask_varlen(
    q, k, lse, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state
):
    """As s_dmask, (batch, heads, max_seqlen_q, max_seqlen_k) rounded up; 0 beyond a sequence."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    batch = len(starts_q) - 1
    rounded = (n + -n % _MULTIPLE for n in (max_q, max_k))
    result = q.new_zeros((batch, q.shape[1], *rounded))
    options = softmax_scale, causal, window, softcap
    for b in range(batch):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        if rows.stop == rows.start or keys.stop == keys.start:
            continue
        slopes = recompute.slopes_of(alibi_slopes, b)
        signed = _signed(q[None, rows], k[None, keys], lse[None, :, rows], *options, slopes, dropout_p, rng_state, b)
        result[b, :, : signed.shape[2], : signed.shape[3]] = signed[0]
    return result


@torch.no_grad()
def _signed(q, k, lse, softmax_scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state, first_batch=0):
    """q's dtype, (batch, heads, seqlen_q, seqlen_k); first_batch: number of q's first batch entry in the whole call."""
    scores = recompute.masked_scores(q, k, softmax_scale, causal, *window, softcap, alibi_slopes)
    row_lse = lse[..., None]
    seen = torch.isfinite(row_lse)
    probabilities = torch.where(seen, torch.exp(scores - torch.where(seen, row_lse, 0.0)), 0.0)
    kept = recompute.dropout_mask(rng_state, *scores.shape, dropout_p, first_batch)
    signed = torch.where(kept, probabilities, -probabilities).to(q.dtype)
    # A dropped probability of 0 shall be negative too.
    return torch.where(kept | (signed != 0), signed, torch.full_like(signed, -0.0))
