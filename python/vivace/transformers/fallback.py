"""Attention for what the kernels do not take: torch's scaled_dot_product_attention, or plain torch where that is too
little.

Tensors are as transformers has them: (batch, heads, tokens, head_dim).
"""

import torch
import torch.nn.functional as F


def visible_of(mask, plan, queries, keys, causal, window, device):
    """bool or float mask broadcastable to (batch, heads, queries, keys), or None where every query sees every key.

    mask: the model's, 4 dimensions, or None; window: (left, right) keys around the query, -1: all.
    """
    if plan is not None:
        return plan.visible()
    if mask is not None:
        return mask
    left, right = window
    if causal:
        right = 0
    if left < 0 and right < 0:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible[None, None]


def sdpa(query, key, value, visible, *, causal, scaling, dropout):
    """torch's attention; causal only with visible None, and then bottom-right aligned. Returns (batch, queries,
    heads, d).
    """
    queries, keys = query.shape[2], key.shape[2]
    if causal and queries != keys and queries > 1:
        visible = visible_of(None, None, queries, keys, True, (-1, -1), query.device)
        causal = False
    causal = causal and queries > 1
    if visible is not None and visible.is_floating_point() and visible.dtype != query.dtype:
        visible = visible.to(query.dtype)
    if key.shape[1] != query.shape[1] and (visible is not None or query.device.type not in ("cuda", "cpu")):
        key, value = (_repeat(t, query.shape[1] // key.shape[1]) for t in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def eager(query, key, value, visible, *, causal, scaling, dropout, softcap=None, sinks=None, head_mask=None):
    """Attention with its matrix of probabilities: (out (batch, queries, heads, d), probabilities in query's dtype)."""
    heads, head_dim = query.shape[1], query.shape[3]
    key, value = (_repeat(t, heads // t.shape[1]) for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (head_dim**-0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is None and causal:
        visible = visible_of(None, None, query.shape[2], key.shape[2], True, (-1, -1), query.device)
    if visible is not None and visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    elif visible is not None:
        scores = scores + visible
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    probabilities = F.dropout(probabilities, dropout) if dropout > 0.0 else probabilities
    if head_mask is not None:
        probabilities = probabilities * head_mask
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


def _repeat(t, times):
    return t if times == 1 else t.repeat_interleave(times, dim=1)
