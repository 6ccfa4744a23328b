"""SiLU (Elfwing et al., arXiv 1702.03118) as a gate."""

import torch


def silu_gate(gate_up):
    """silu(gate) * up over the last dimension [gate | up], float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1.0 + torch.exp(-gate)) * up
