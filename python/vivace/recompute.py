"""Attention in plain torch, to differentiate where there is no backward kernel. O(seqlen_q * seqlen_k) memory, fp32.

The same semantics as torch.ops.vivace.attention, dropout's bits included. `backward` is also an operator,
torch.ops.vivace.attention_recompute_backward, so that torch.compile takes it as one node: it reads lengths, which
tracing could not.
"""

import math

import torch

_MASK32 = 0xFFFFFFFF

_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, float? softmax_scale, bool causal, int window_left, "
    "int window_right, float softcap, Tensor? alibi_slopes, Tensor? bias, Tensor? sinks, float dropout_p, "
    "Tensor? rng_state, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


def register() -> None:
    """Registers torch.ops.vivace.attention_recompute_backward."""
    name = "vivace::attention_recompute_backward"
    torch.library.define(name, _SCHEMA)
    torch.library.impl(name, ("CPU", "CUDA"), backward)
    torch.library.register_fake(name, _fake_backward)


def backward(
    dout,
    dlse,
    q,
    k,
    v,
    softmax_scale,
    causal,
    window_left,
    window_right,
    softcap,
    alibi_slopes,
    bias,
    sinks,
    dropout_p,
    rng_state,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
):
    """Gradients (dq, dk, dv, dbias, dsinks) for gradients of out and lse, either of which may be None.

    Empty tensors stand for dbias and dsinks where there is no (floating) bias, no sinks. With cu_seqlens the tensors
    are packed, as for attention_varlen.
    """
    scalars = softmax_scale, causal, window_left, window_right, softcap
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        if bias is not None:
            bias = bias.detach().requires_grad_(bias.is_floating_point())
        if sinks is not None:
            sinks = sinks.detach().requires_grad_()
    extras = [t for t in (bias, sinks) if t is not None and t.requires_grad]
    sums = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (*inputs, *extras)]

    def add(q, k, v, slopes, dout, dlse, first_batch):
        with torch.enable_grad():
            results = attention(q, k, v, *scalars, slopes, bias, sinks, dropout_p, rng_state, first_batch)
        pairs = [(r, g) for r, g in zip(results, (dout, dlse), strict=True) if g is not None]
        grads = torch.autograd.grad([r for r, _ in pairs], [*inputs, *extras], [g for _, g in pairs], allow_unused=True)
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += grad

    if cu_seqlens_q is None:
        add(*inputs, alibi_slopes, dout, dlse, 0)
    else:
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        used_q = None if seqused_q is None else seqused_q.tolist()
        used_k = None if seqused_k is None else seqused_k.tolist()
        for b in range(len(starts_q) - 1):
            rows = slice(starts_q[b], starts_q[b + 1] if used_q is None else starts_q[b] + used_q[b])
            keys = slice(starts_k[b], starts_k[b + 1] if used_k is None else starts_k[b] + used_k[b])
            with torch.enable_grad():
                sequence = [t[None, part] for t, part in zip(inputs, (rows, keys, keys), strict=True)]
            add(
                *sequence,
                slopes_of(alibi_slopes, b),
                None if dout is None else dout[None, rows],
                None if dlse is None else dlse[None, :, rows],
                b,
            )
    extra = iter(sums[3:])
    dbias, dsinks = (next(extra) if t is not None and t.requires_grad else q.new_empty(0) for t in (bias, sinks))
    return *sums[:3], dbias, dsinks


def _fake_backward(dout, dlse, q, k, v, *args):
    bias, sinks = args[6], args[7]
    like = [t if t is not None and t.is_floating_point() else None for t in (bias, sinks)]
    return *(t.new_empty(t.shape) for t in (q, k, v)), *(
        q.new_empty(0) if t is None else t.new_empty(t.shape) for t in like
    )


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
    first_batch=0,
):
    """out (batch, seqlen_q, heads, head_dim_v) in q's dtype and lse (batch, heads, seqlen_q) fp32, both differentiable.

    first_batch: number of q's first batch entry in the whole call, for dropout.
    """
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    scores = masked_scores(q, k, softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, bias)
    compute = scores.dtype
    v_heads = v.to(compute).transpose(1, 2).repeat_interleave(heads // heads_kv, dim=1)

    # A row that sees nothing would give NaN gradients through -inf - -inf: it is computed on zeros and then dropped.
    seen = (scores > -math.inf).any(dim=-1, keepdim=True) | scores.isnan().any(dim=-1, keepdim=True)
    logits = torch.where(seen, scores, 0.0)
    if sinks is not None:
        sink = sinks.to(compute)[None, :, None, None].expand(batch, heads, seqlen_q, 1)
        logits = torch.cat((logits, sink), dim=-1)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    probs = torch.where(seen, torch.exp(logits[..., :seqlen_k] - lse), 0.0)
    if dropout_p > 0.0:
        kept = dropout_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p, first_batch)
        probs = probs * kept / (1.0 - dropout_p)
    out = torch.matmul(probs, v_heads).transpose(1, 2).to(q.dtype)
    return out, torch.where(seen, lse, -math.inf).squeeze(-1).to(torch.float32)


def slopes_of(alibi_slopes, entry):
    """ALiBi slopes of one batch entry: (1, heads) of (batch, heads); (heads,) and None serve every entry."""
    return alibi_slopes[entry : entry + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes


def masked_scores(
    q, k, softmax_scale=None, causal=False, window_left=-1, window_right=-1, softcap=0.0, alibi_slopes=None, bias=None
):
    """(batch, heads, seqlen_q, seqlen_k) in fp32 (fp64 for fp64), -inf where hidden."""
    _, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    group = heads // heads_kv
    q_heads = q.to(compute).transpose(1, 2)  # (batch, heads, seqlen_q, head_dim)
    k_heads = k.to(compute).transpose(1, 2).repeat_interleave(group, dim=1)
    scores = torch.matmul(q_heads, k_heads.transpose(2, 3)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)  # the diagonal's column
    column = torch.arange(seqlen_k, device=q.device)[None, :]
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        scores = scores - slopes.to(compute)[:, :, None, None] * (row - column).abs()
    visible = torch.ones((seqlen_q, seqlen_k), dtype=torch.bool, device=q.device)
    if window_left >= 0:
        visible = visible & (column >= row - window_left)
    if causal:
        window_right = 0
    if window_right >= 0:
        visible = visible & (column <= row + window_right)
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        scores = scores + bias.to(compute)
    return scores.masked_fill(~visible, -math.inf)


def dropout_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p, first_batch=0):
    """What kernels/common/philox.h keeps: bool (batch, heads, seqlen_q, seqlen_k)."""
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    head_row = torch.arange(first_batch * heads, (first_batch + batch) * heads, device=device)[:, None, None]
    row = torch.arange(seqlen_q, device=device)[None, :, None]
    block = torch.arange((seqlen_k + 15) // 16, device=device)[None, None, :]
    high = offset + (head_row << 32)
    words = _philox4x32_10(seed, block, row, high & _MASK32, (high >> 32) & _MASK32)
    draws = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # (batch * heads, seqlen_q, blocks, 4)
    shifts = torch.arange(0, 32, 8, device=device)
    columns = ((draws[..., None] >> shifts) & 0xFF).flatten(2)[..., :seqlen_k]
    kept = columns <= math.floor((1.0 - dropout_p) * 255.0 + 1e-3)
    return kept.view(batch, heads, seqlen_q, seqlen_k)


def _philox4x32_10(key, c0, c1, c2, c3):
    # Salmon et al., SC 2011, in int64: a product's low 64 bits are right although the type is signed.
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3
