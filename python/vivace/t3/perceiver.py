"""Resampler of the voice prompt: any number of tokens in, a fixed number out (Perceiver, arXiv 2103.03206)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Perceiver(nn.Module):
    """Learned queries attend to the prompt, then to themselves, through one block with shared weights.

    Pre-norm attention with a residual connection around it; LayerNorm and biased projections.
    """

    def __init__(self, hidden_size: int, queries: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(queries, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.proj_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, prompt: Tensor) -> Tensor:
        """prompt (tokens, hidden) -> (queries, hidden)."""
        resampled = self.attend(self.queries, prompt)
        return self.attend(resampled, resampled)

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        # The context is normalised with the same weights as x.
        normed = self.norm(context)
        q = self.split(self.to_q(self.norm(x)))  # (1, heads, queries, head_dim); head_dim is 256 in Chatterbox
        k = self.split(self.to_k(normed))  # (1, heads, tokens, head_dim)
        v = self.split(self.to_v(normed))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))

    def split(self, x: Tensor) -> Tensor:
        return x.view(1, x.size(0), self.heads, x.size(1) // self.heads).transpose(1, 2)
