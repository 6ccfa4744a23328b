"""Rotary position embedding (RoFormer, arXiv 2104.09864): each pair (a, b) turns by its position's angle."""

import torch


def rotary_embedding(x, cos, sin, positions, interleaved=False, *, compute=torch.float64):
    """x (tokens, heads, head_dim), cos and sin (max_position, rotary_dim / 2), positions (tokens).

    Returns compute's dtype. interleaved pairs (2i, 2i + 1), as GPT-J; otherwise (i, i + rotary_dim / 2), as NeoX. In 16
    bits the arithmetic is in float32 and rounded once.
    """
    wide = torch.float64 if compute == torch.float64 else torch.float32
    half = cos.shape[-1]
    positions = positions.to(torch.int64)
    c = cos.to(wide)[positions][:, None, :]
    s = sin.to(wide)[positions][:, None, :]
    out = x.to(wide).clone()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = out[..., first].clone(), out[..., second].clone()
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return out.to(compute)
