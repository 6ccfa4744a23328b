"""Attention as flash-attn 2.8 defines it: bottom-right alignment, inclusive windows, softcap, ALiBi, bias, mask."""

import math

import torch

from .philox import dropout_keep


def visible(seqlen_q, seqlen_k, causal=False, window_left=-1, window_right=-1, device="cpu"):
    """(seqlen_q, seqlen_k) bool: query i stands at key i + seqlen_k - seqlen_q and sees its window, ends included."""
    position = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=device)[None, :]
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal:
        window_right = 0
    if window_left >= 0:
        seen &= key >= position - window_left
    if window_right >= 0:
        seen &= key <= position + window_right
    return seen


def scores(q, k, *, softmax_scale, softcap, alibi_slopes, bias, compute):
    """(batch, heads, seqlen_q, seqlen_k) of the softmax's dtype, without the mask of causal and windows."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    q = q.to(compute)
    k = (k.to(compute) * scale).repeat_interleave(heads // heads_kv, dim=2)  # low precision: the scale is on k
    s = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1))
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    s = s.to(softmax_dtype(compute))
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(s.dtype).expand(batch, heads)[:, :, None, None]
        position = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
        distance = (position - torch.arange(seqlen_k, device=q.device)[None, :]).abs()
        s = s - slopes * distance
    if bias is not None:
        hides = bias.dtype == torch.bool
        s = s.masked_fill(~bias.expand(s.shape), -math.inf) if hides else s + bias.to(s.dtype)
    return s


def softmax_dtype(compute):
    """16-bit attention still takes its softmax in float32, as torch's softmax does inside."""
    return torch.float64 if compute == torch.float64 else torch.float32


def weighted_sum(p, v, hidden):
    """p @ v, where a hidden key adds nothing even if its value is NaN or infinite."""
    if bool(torch.isfinite(v).all()):
        return torch.matmul(p, v)
    products = p[..., :, None] * v[..., None, :, :]  # (batch, heads, seqlen_q, seqlen_k, head_dim_v)
    return products.masked_fill(hidden[..., None], 0.0).sum(dim=-2)


def attention(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    sinks=None,
    dropout_p=0.0,
    rng_state=None,
    *,
    batch_index=0,
    return_probs=False,
    compute=torch.float64,
):
    """Dense attention: q (batch, seqlen_q, heads, d), k and v (batch, seqlen_k, heads_kv, ...).

    Returns out (batch, seqlen_q, heads, head_dim_v) of ``compute`` and lse (batch, heads, seqlen_q) of the softmax's
    dtype, sinks included, -inf for a row that sees no key (with sinks too); with return_probs also the probabilities
    before dropout. ``batch_index`` is what batch entry 0 is called by the dropout's counters.
    """
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    s = scores(
        q, k, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias, compute=compute
    )
    seen = visible(seqlen_q, seqlen_k, causal, window_left, window_right, q.device)
    s = s.masked_fill(~seen, -math.inf)
    hidden = s.detach() == -math.inf

    largest = s.detach().amax(dim=-1, keepdim=True) if seqlen_k > 0 else s.new_full((*s.shape[:3], 1), -math.inf)
    empty = hidden.all(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(s.dtype)[None, :, None, None].expand(batch, heads, seqlen_q, 1)
        largest = torch.maximum(largest, sink.detach())
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    e = torch.exp(s - largest)
    total = e.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - largest)
    total = total.masked_fill(empty, 1.0)
    p = e / total
    lse = (torch.log(total) + largest).masked_fill(empty, -math.inf).squeeze(-1)

    weights = p
    if dropout_p > 0:
        seed, offset = (int(x) for x in rng_state.tolist())
        head_rows = [(batch_index + b) * heads + h for b in range(batch) for h in range(heads)]
        keep = torch.from_numpy(dropout_keep(seed, offset, head_rows, seqlen_q, seqlen_k, dropout_p)).to(q.device)
        weights = p * keep.view(batch, heads, seqlen_q, seqlen_k) / (1.0 - dropout_p)
    v = v.to(compute).repeat_interleave(heads // heads_kv, dim=2).permute(0, 2, 1, 3)
    out = weighted_sum(weights.to(compute), v, hidden).permute(0, 2, 1, 3)
    return (out, lse, p) if return_probs else (out, lse)


def gradients(q, k, v, dout, *, compute=torch.float64, function=attention, **options):
    """(dq, dk, dv) of ``function`` by autograd in ``compute``.

    In low precision with the error that flash-attention's backward has by its nature: it takes rowsum(P * dP) as
    rowsum(dout * out) from the rounded out. The gradient of lse is P, so that error enters as a gradient of lse.
    """
    leaves = [t.detach().to(compute).requires_grad_() for t in (q, k, v)]
    out, lse = function(*leaves, compute=compute, **options)
    if compute == torch.float64:
        return torch.autograd.grad(out, leaves, dout.double())
    exact = function(q.detach(), k.detach(), v.detach(), compute=torch.float64, **options)[0]
    row_sum = (dout.float() * out.detach().float()).sum(dim=-1)
    error = ((dout.double() * exact).sum(dim=-1) - row_sum).float().transpose(-1, -2)
    return torch.autograd.grad((out, lse), leaves, (dout.to(compute), error))
