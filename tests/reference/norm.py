"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

import torch


def rms_norm(x, weight, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, float64."""
    x = x.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.double()


def add_rms_norm(x, residual, weight, eps=1e-5):
    """(norm of the sum, float64; the sum in the tensors' dtype, which is the new residual)."""
    total = (x.double() + residual.double()).to(x.dtype)
    return rms_norm(total, weight, eps), total
