"""The token step by transformers' LlamaModel with the same weights: eager, and torch.compile with CUDA graphs.

Less work than vivace's step does: guidance and the largest logit, no penalties and no draw.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vivace.bench.step_state import GUIDANCE, State, Weights
from vivace.bench.timing import Call


def missing() -> str | None:
    """Why there are no peers, or None."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def llama(weights: Weights):
    """transformers' LlamaModel whose parameters are views of ``weights``."""
    from transformers import LlamaConfig, LlamaModel

    c = weights.config
    scaling = None
    if c.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_positions,
        }
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=131072,
        rope_theta=c.rope_theta,
        rope_scaling=scaling,
        attn_implementation="sdpa",
        use_cache=True,
    )
    device, dtype = weights.qkv.device, weights.qkv.dtype
    with torch.device("meta"):
        model = LlamaModel(config)
    parameters = {"norm.weight": weights.norm}
    parts = [c.num_heads * c.head_dim] + 2 * [c.num_kv_heads * c.head_dim]
    for i in range(c.num_layers):
        name = f"layers.{i}"
        q, k, v = weights.qkv[i].split(parts)
        gate, up = weights.gate_up[i].chunk(2)
        parameters |= {
            f"{name}.input_layernorm.weight": weights.input_norm[i],
            f"{name}.post_attention_layernorm.weight": weights.post_norm[i],
            f"{name}.self_attn.q_proj.weight": q,
            f"{name}.self_attn.k_proj.weight": k,
            f"{name}.self_attn.v_proj.weight": v,
            f"{name}.self_attn.o_proj.weight": weights.out[i],
            f"{name}.mlp.gate_proj.weight": gate,
            f"{name}.mlp.up_proj.weight": up,
            f"{name}.mlp.down_proj.weight": weights.down[i],
        }
    parameters["embed_tokens.weight"] = torch.zeros(8, c.hidden_size, device=device, dtype=dtype)
    model.load_state_dict(parameters, assign=True)
    # Its buffers (frequencies) are computed by its constructor, from the configuration.
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(config=config)
    return model.to(device).eval()


class Peer:
    """One form of LlamaModel at one state."""

    def __init__(self, model, state: State):
        self.model = model
        self.state = state
        self.cache = self.static_cache()
        self.mutable = [layer for layer in self.cache.layers if hasattr(layer, "cumulative_length")]

    def static_cache(self):
        """Of the state's capacity and contents; a static cache is what torch.compile needs."""
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=self.state.capacity)
        for i, layer in enumerate(cache.layers):
            k, v = (t[i, : self.state.rows].transpose(1, 2) for t in (self.state.k_cache, self.state.v_cache))
            layer.lazy_initialization(k[:, :, :1], v[:, :, :1])
            layer.keys.copy_(k)
            layer.values.copy_(v)
        return cache

    def rewind(self) -> None:
        """Newer versions count the keys in the cache themselves."""
        for layer in self.mutable:
            layer.cumulative_length.fill_(self.state.tokens_cached)

    @contextlib.contextmanager
    def context(self):
        self.rewind()
        yield

    def logits_function(self) -> Callable[[], Tensor]:
        """A function of no arguments: (rows, vocab) float32."""
        state, weights = self.state, self.state.weights
        position = torch.full((1,), state.tokens_cached, device=weights.qkv.device)
        extra = {}
        if "cache_position" in inspect.signature(type(self.model).forward).parameters:
            extra["cache_position"] = position
        positions = position.unsqueeze(0)

        def logits():
            x = (weights.speech_emb[state.tokens] + weights.speech_pos_emb[state.positions])[state.row_request]
            hidden = self.model(
                inputs_embeds=x.unsqueeze(1),
                past_key_values=self.cache,
                position_ids=positions,
                use_cache=True,
                **extra,
            ).last_hidden_state
            return F.linear(hidden[:, 0], weights.head).float()

        return logits

    def call(self, form: str) -> Call:
        """ "eager" or "compile", with the guided logits' largest as the token."""
        logits, requests = self.logits_function(), self.state.requests
        guided = self.state.rows > requests

        def step():
            values = logits()
            if guided:
                cond, uncond = values[:requests], values[requests:]
                values = cond + GUIDANCE * (cond - uncond)
            return values.argmax(-1)

        if form == "compile":
            step = torch.compile(step, mode="reduce-overhead", fullgraph=False, dynamic=False)
        return Call(step, self.context)
