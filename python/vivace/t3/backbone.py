"""The Llama decoder of T3 on vivace's operators."""

import torch
from torch import Tensor, nn

from vivace.t3.config import T3Config


class DecoderLayer(nn.Module):
    """One Llama layer: attention over the KV cache, then a SwiGLU MLP, each with RMSNorm before it.

    The residual stream is updated in place: a layer takes the output of the one before it, which add_rms_norm adds
    to the stream and normalises in one pass.
    """

    def __init__(self, config: T3Config, index: int):
        super().__init__()
        self.index = index
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        # Row of `probes` that this layer writes, and the head it looks at; -1: none.
        self.probe_index = -1
        self.probe_head = -1
        for probe, (layer, head) in enumerate(config.alignment_heads):
            if layer == index:
                self.probe_index, self.probe_head = probe, head

        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, width + 2 * config.num_kv_heads * config.head_dim, bias=False)  # q | k | v
        self.out = nn.Linear(width, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)  # gate | up
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        cu_seqlens_q: Tensor | None,
        max_seqlen_q: int,
        probes: Tensor | None,
    ) -> Tensor:
        """x, residual (tokens, hidden) -> the MLP's output (tokens, hidden), not yet added to the residual stream."""
        x = torch.ops.vivace.add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(
            x, cos, sin, k_cache, v_cache, cache_seqlens, cache_batch_idx, cu_seqlens_q, max_seqlen_q, probes
        )
        x = torch.ops.vivace.add_rms_norm(x, residual, self.post_norm, self.eps)
        return self.down(torch.ops.vivace.silu_gate(self.gate_up(x)))

    def attention(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        cu_seqlens_q: Tensor | None,
        max_seqlen_q: int,
        probes: Tensor | None,
    ) -> Tensor:
        """Appends the keys and values of x to this layer's cache and attends: (tokens, hidden) -> (tokens, hidden)."""
        tokens = x.size(0)
        qkv = self.qkv(x).view(tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if cu_seqlens_q is None:
            qkv = qkv.unsqueeze(1)  # (rows, 1, heads + 2 * kv_heads, head_dim): one token a row
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        probe: Tensor | None = None
        if probes is not None and self.probe_index >= 0:
            probe = probes[self.probe_index]  # (rows, probe_rows, capacity)
        out, _ = torch.ops.vivace.attention_with_kvcache(
            q,
            k_cache[self.index],
            v_cache[self.index],
            k=k,
            v=v,
            cache_seqlens=cache_seqlens,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_batch_idx=cache_batch_idx,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            causal=True,
            rotary_interleaved=False,
            probe=probe,
            probe_head=self.probe_head,
        )
        return self.out(out.reshape(tokens, self.num_heads * self.head_dim))


class Backbone(nn.Module):
    """The decoder layers and the final norm."""

    def __init__(self, config: T3Config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        cu_seqlens_q: Tensor | None,
        max_seqlen_q: int,
        probes: Tensor | None,
    ) -> Tensor:
        """x (tokens, hidden), left as it is -> hidden states after the final norm (tokens, hidden)."""
        residual = torch.zeros_like(x)  # the first add_rms_norm puts x into it
        for layer in self.layers:
            x = layer(
                x,
                residual,
                cos,
                sin,
                k_cache,
                v_cache,
                cache_seqlens,
                cache_batch_idx,
                cu_seqlens_q,
                max_seqlen_q,
                probes,
            )
        return torch.ops.vivace.add_rms_norm(x, residual, self.norm, self.eps)
