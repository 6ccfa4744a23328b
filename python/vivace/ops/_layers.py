"""What stands between attention and the products of a layer: norm, rotary embedding, gate."""

import torch

from vivace.ops._loaded import operators
from vivace.ops._tensors import last_contiguous, mutated, no_gradient, rows_even


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Args:
        x: (..., width).
        weight: (width,) of x's dtype.
        eps: added to the mean of squares.

    Returns:
        x's shape and dtype, contiguous. Differentiable in x and weight.
    """
    return operators.rms_norm(rows_even(x), weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """residual += x, in place, then rms_norm of residual: one pass over memory. Not differentiable.

    Args:
        x: (..., width).
        residual: x's shape and dtype; written in place.
        weight: (width,) of x's dtype.

    Returns:
        The norm: x's shape and dtype, contiguous.
    """
    no_gradient("add_rms_norm", x, residual, weight)
    out = operators.add_rms_norm(rows_even(x), residual, weight, eps)
    mutated(residual)
    return out


def rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the first rotary_dim dimensions of each head; the rest is copied.

    Args:
        x: (tokens, heads, head_dim) or (batch, seqlen, heads, head_dim).
        cos: (max_position, rotary_dim / 2), float32 or x's dtype.
        sin: as cos.
        positions: int32 or int64, (tokens,) or (batch, seqlen); None: 0, 1, ... in each sequence.
        interleaved: pairs (2i, 2i + 1), as GPT-J; otherwise (i, i + rotary_dim / 2), as NeoX and Llama.

    Returns:
        x's shape and dtype, contiguous. Differentiable in x.
    """
    return operators.rotary_embedding(last_contiguous(x), cos, sin, positions, interleaved)


def rotary_embedding_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """`rotary_embedding` in place; returns x. Not differentiable."""
    no_gradient("rotary_embedding_", x)
    operators.rotary_embedding_(x, cos, sin, positions, interleaved)
    mutated(x)
    return x


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the last dimension is [gate | up]: SwiGLU's activation (arXiv 2002.05202).

    Args:
        gate_up: (..., 2 * width).

    Returns:
        (..., width), contiguous. Differentiable.
    """
    return operators.silu_gate(rows_even(gate_up))
