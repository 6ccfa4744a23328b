"""Rotary position tables (RoFormer, arXiv 2104.09864) with Llama 3.1's frequency scaling."""

import math

import torch
from torch import Tensor

from vivace.t3.config import RopeScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle a position for each pair of dimensions: (head_dim / 2) float32.

    Llama 3.1 divides the frequencies of wavelengths longer than the original context by `factor`, keeps the short ones,
    and blends between.
    """
    # float32 throughout, as in transformers: the model was trained with these roundings.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_positions
    keep = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    long = wavelengths > original / scaling.low_freq_factor
    short = wavelengths < original / scaling.high_freq_factor
    return torch.where(long, frequencies / scaling.factor, torch.where(short, frequencies, blended))


def rotary_table(positions: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Cosines and sines: (2, positions, head_dim / 2) float32."""
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float32, device="cpu"), rotary_frequencies(head_dim, theta, scaling)
    )
    return torch.stack([angles.cos(), angles.sin()])
