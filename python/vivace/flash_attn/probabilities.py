"""S_dmask, what flash-attn returns for its tests with dropout: the probabilities, negative where they were dropped."""

import torch
import torch.nn.functional as F

from vivace import recompute

_MULTIPLE = 128


def s_dmask(q, k, lse, softmax_scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state):
    """q's dtype, (batch, heads, seqlen_q, seqlen_k) with both lengths rounded up to 128. Its scaling is the
    softmax's.
    """
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    with torch.no_grad():
        scores = recompute.masked_scores(q, k, softmax_scale, causal, *window, softcap, alibi_slopes)
        seen = torch.isfinite(lse)[..., None]
        probabilities = torch.where(seen, torch.exp(scores - torch.where(seen, lse[..., None], 0.0)), 0.0)
        kept = recompute.dropout_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p)
        signed = torch.where(kept, probabilities, -probabilities).to(q.dtype)
        # A dropped probability of 0 shall be negative too.
        signed = torch.where(kept | (signed != 0), signed, torch.full_like(signed, -0.0))
        return F.pad(signed, (0, -seqlen_k % _MULTIPLE, 0, -seqlen_q % _MULTIPLE))


def s_dmask_varlen(
    q, k, lse, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state
):
    """As s_dmask, (batch, heads, max_seqlen_q, max_seqlen_k) rounded up; 0 beyond a sequence."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    batch = len(starts_q) - 1
    rounded = (n + -n % _MULTIPLE for n in (max_q, max_k))
    result = q.new_zeros((batch, q.shape[1], *rounded))
    with torch.no_grad():
        for b in range(batch):
            rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
            if rows.stop == rows.start or keys.stop == keys.start:
                continue
            slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
            scores = recompute.masked_scores(
                q[None, rows], k[None, keys], softmax_scale, causal, *window, softcap, slopes
            )
            row_lse = lse[None, :, rows, None]
            seen = torch.isfinite(row_lse)
            probabilities = torch.where(seen, torch.exp(scores - torch.where(seen, row_lse, 0.0)), 0.0)
            kept = recompute.dropout_mask(rng_state, 1, q.shape[1], *scores.shape[2:], dropout_p, first_batch=b)
            signed = torch.where(kept, probabilities, -probabilities).to(q.dtype)
            result[b, :, : scores.shape[2], : scores.shape[3]] = torch.where(
                kept | (signed != 0), signed, torch.full_like(signed, -0.0)
            )[0]
    return result
