"""What a token step works on: T3's weights as decode_step takes them, a filled KV cache, requests being sampled."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import vivace.ops
from vivace.t3.config import RopeScaling, T3Config, preset
from vivace.t3.rotary import rotary_table

GUIDANCE = 0.5
SLACK = 64  # positions behind the measured one


@dataclass
class Weights:
    """T3's decoder, stacked over its L layers; ``tables`` are the embeddings, of which a step reads a row a request."""

    config: T3Config
    speech_emb: Tensor  # (vocab, hidden)
    speech_pos_emb: Tensor  # (positions, hidden)
    input_norm: Tensor  # (L, hidden)
    qkv: Tensor  # (L, q + k + v, hidden)
    out: Tensor  # (L, hidden, q)
    post_norm: Tensor  # (L, hidden)
    gate_up: Tensor  # (L, 2 * intermediate, hidden)
    down: Tensor  # (L, hidden, intermediate)
    norm: Tensor  # (hidden,)
    head: Tensor  # (vocab, hidden)

    NAMES = (
        "speech_emb",
        "speech_pos_emb",
        "input_norm",
        "qkv",
        "out",
        "post_norm",
        "gate_up",
        "down",
        "norm",
        "head",
    )

    def tensors(self) -> list[Tensor]:
        """In the order of decode_step's arguments."""
        return [getattr(self, name) for name in self.NAMES]

    def step_bytes(self) -> int:
        """Bytes of weights that every step reads, whatever its rows."""
        return sum(t.numel() * t.element_size() for t in self.tensors()[2:])


def shapes(config: T3Config) -> dict[str, tuple[int, ...]]:
    layers, hidden, vocab = config.num_layers, config.hidden_size, config.speech_vocab_size
    width = config.num_heads * config.head_dim
    return {
        "speech_emb": (vocab, hidden),
        "speech_pos_emb": (config.speech_positions, hidden),
        "input_norm": (layers, hidden),
        "qkv": (layers, width + 2 * config.num_kv_heads * config.head_dim, hidden),
        "out": (layers, hidden, width),
        "post_norm": (layers, hidden),
        "gate_up": (layers, 2 * config.intermediate_size, hidden),
        "down": (layers, hidden, config.intermediate_size),
        "norm": (hidden,),
        "head": (vocab, hidden),
    }


def random_weights(shape: str, dtype: torch.dtype, device: str, seed: int) -> Weights:
    """Normally distributed, scaled so that activations keep their size; norms near 1."""
    config = preset(shape)
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, size in shapes(config).items():
        values = torch.randn(*size, generator=generator, device=device, dtype=dtype)
        if name.endswith("norm"):
            made[name] = values.mul_(0.1).add_(1)
        else:
            made[name] = values.mul_(0.02 if name.startswith("speech") else size[-1] ** -0.5)
    return Weights(config, **made)


def archive_weights(path: Path, dtype: torch.dtype | None, device: str) -> Weights:
    """The decoder of a file that vivace export wrote; in its own dtype where none is given."""
    from vivace.t3 import archive

    module = archive.load(path)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    config = archive_config(module.manifest)
    made = {}
    for name, size in shapes(config).items():
        if name in ("speech_emb", "speech_pos_emb"):
            tensor = state[f"{name}.weight"]
        elif name == "head":
            tensor = state["speech_head.weight"]
        elif name == "norm":
            tensor = state["backbone.norm"]
        else:
            tensor = stacked(state, name, config.num_layers)
        if tuple(tensor.shape) != size:
            raise ValueError(f"vivace bench step: {path}: {name} has shape {list(tensor.shape)}, expected {list(size)}")
        made[name] = tensor.detach().to(device, dtype or tensor.dtype)
    return Weights(config, **made)


def archive_config(manifest: dict) -> T3Config:
    """The configuration that a manifest describes, as far as the decoder goes."""
    model, speech = manifest["model"], manifest["speech"]
    names = {field.name for field in dataclasses.fields(T3Config)} - {"rope_scaling"}
    fields = {name: value for name, value in model.items() if name in names}
    scaling = RopeScaling(**model["rope_scaling"]) if model["rope_scaling"] else None
    return T3Config(
        **fields,
        rope_scaling=scaling,
        text_vocab_size=manifest["text"]["vocab_size"],
        speech_vocab_size=speech["vocab_size"],
        max_speech_tokens=speech["max_tokens"],
    )


def stacked(state: dict[str, Tensor], name: str, layers: int) -> Tensor:
    """A parameter of all layers: one tensor already, or one a layer."""
    for whole in (f"backbone.{name}", f"backbone.{name}.weight"):
        if whole in state:
            return state[whole]
    for suffix in ("", ".weight"):
        if f"backbone.layers.0.{name}{suffix}" in state:
            return torch.stack([state[f"backbone.layers.{i}.{name}{suffix}"] for i in range(layers)])
    raise ValueError(f"vivace bench step: the model has no backbone.layers.0.{name}")


@dataclass
class State:
    """Requests at one length. Rows 0..requests-1 are the conditional ones, the guided requests' others follow."""

    weights: Weights
    rows: int
    tokens_cached: int
    tokens: Tensor  # (requests,) int64
    positions: Tensor  # (requests,) int64
    row_request: Tensor  # (rows,) int64
    k_cache: Tensor  # (L, rows, capacity, kv_heads, head_dim), a head's keys contiguous
    v_cache: Tensor
    cache_seqlens: Tensor  # (rows,) int32
    cache_batch_idx: Tensor  # (rows,) int32
    rotary: Tensor  # (2, positions, head_dim / 2) float32

    @property
    def requests(self) -> int:
        return self.tokens.size(0)

    @property
    def capacity(self) -> int:
        return self.k_cache.size(2)

    def kv_bytes(self) -> int:
        """Keys and values that a step reads."""
        config = self.weights.config
        width = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.k_cache.element_size()
        return self.rows * self.tokens_cached * width

    def step_bytes(self) -> int:
        return self.weights.step_bytes() + self.kv_bytes()


def requests_of(rows: int) -> int:
    """An even number of rows is half as many guided requests; an odd one as many requests without guidance."""
    return rows // 2 if rows % 2 == 0 else rows


def capacity_of(tokens: int) -> int:
    """Positions of a cache that holds ``tokens``: whole thousands, as an engine's has."""
    return -(-(tokens + SLACK) // 1024) * 1024 if tokens >= 256 else tokens + SLACK


def pitch_of(capacity: int) -> int:
    """Positions from one head's keys to the next one's, as in the engine's caches (``Model::cache_pitch``)."""
    return capacity + 8 if capacity % 256 == 0 else capacity


def make_state(weights: Weights, rows: int, tokens: int, seed: int) -> State:
    """A cache of normally distributed keys and values, ``tokens`` in every row."""
    config, device, dtype = weights.config, weights.qkv.device, weights.qkv.dtype
    generator = torch.Generator(device).manual_seed(seed + 1)
    requests = requests_of(rows)
    capacity = capacity_of(tokens)
    shape = (config.num_layers, rows, config.num_kv_heads, pitch_of(capacity), config.head_dim)
    caches = []
    for _ in range(2):
        cache = torch.zeros(shape, device=device, dtype=dtype)[:, :, :, :capacity]
        cache[:, :, :, :tokens].normal_(generator=generator)
        caches.append(cache.transpose(2, 3))
    order = torch.arange(requests, device=device)
    table = rotary_table(max(capacity, 2), config.head_dim, config.rope_theta, config.rope_scaling)
    return State(
        weights,
        rows,
        tokens,
        tokens=torch.randint(config.first_invalid_speech_token, (requests,), generator=generator, device=device),
        positions=torch.full((requests,), min(tokens, config.speech_positions - 2), device=device),
        row_request=order.repeat(rows // requests),
        k_cache=caches[0],
        v_cache=caches[1],
        cache_seqlens=torch.full((rows,), tokens, device=device, dtype=torch.int32),
        cache_batch_idx=torch.arange(rows, device=device, dtype=torch.int32),
        rotary=table.to(device),
    )


@dataclass
class Sampling:
    """Chatterbox's defaults for every request."""

    rows: Tensor  # (requests, 2) int32
    seen: Tensor  # (requests, vocab) uint8
    cfg_weight: Tensor
    temperature: Tensor
    repetition_penalty: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor
    step: Tensor

    def arguments(self) -> list[Tensor]:
        return list(vars(self).values())


def make_sampling(state: State, seed: int) -> Sampling:
    requests, device = state.requests, state.tokens.device

    def full(value, dtype=torch.float32):
        return torch.full((requests,), value, device=device, dtype=dtype)

    order = torch.arange(requests, device=device, dtype=torch.int32)
    guided = state.rows > requests
    others = order + requests if guided else torch.full_like(order, -1)
    return Sampling(
        torch.stack([order, others], dim=1),
        torch.zeros(requests, state.weights.config.speech_vocab_size, device=device, dtype=torch.uint8),
        full(GUIDANCE if guided else 0.0),
        full(0.8),
        full(1.2),
        full(0.05),
        full(1.0),
        full(0, torch.int32),
        torch.arange(requests, device=device) + seed,
        torch.zeros(requests, device=device, dtype=torch.int64),
    )


def own_step(state: State, seed: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """vivace's step: a function of no arguments that returns the drawn tokens, and one that returns the logits.

    Lengths stay as they are, so that every step of a measurement is the same. Where no fused kernel takes the shape the
    layers run one by one.
    """
    sampling = make_sampling(state, seed)
    logits = fused_logits(state) if workspace_bytes(state) >= 0 else operator_logits(state)
    advance, last = torch.zeros_like(state.tokens), state.capacity - 1
    drawn = state.tokens.clone()  # not the step's input: that would be another token in each step

    def step():
        vivace.ops.sample_advance(
            logits(), *sampling.arguments(), drawn, state.positions, state.cache_seqlens, advance, last
        )
        return drawn

    return step, logits


def path_of(state: State) -> str:
    """The last step's kernels: decode_step's "step_persistent", "step_chain", "step_split", "step_mesh", "cpu", or
    "operators"."""
    return vivace.ops.decode_step_kernel() if workspace_bytes(state) >= 0 else "operators"


def workspace_bytes(state: State) -> int:
    """Of decode_step; -1 where no kernel of this device takes the shape."""
    weights = state.weights
    return vivace.ops.decode_step_workspace(weights.qkv, weights.down, weights.head, state.k_cache, state.rows)


def fused_logits(state: State) -> Callable[[], Tensor]:
    weights = state.weights
    device = weights.qkv.device
    workspace = torch.zeros(workspace_bytes(state), dtype=torch.uint8, device=device)
    arguments = [
        *weights.tensors(),
        state.rotary[0],
        state.rotary[1],
        state.k_cache,
        state.v_cache,
        state.cache_seqlens,
        state.cache_batch_idx,
        workspace,
    ]
    eps = weights.config.rms_norm_eps
    return lambda: vivace.ops.decode_step(state.tokens, state.positions, state.row_request, *arguments, eps=eps)


def operator_logits(state: State) -> Callable[[], Tensor]:
    """The layers of vivace.t3.backbone on the stacked weights."""
    weights, config, ops = state.weights, state.weights.config, torch.ops.vivace
    heads, heads_kv, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
    split = [heads, heads_kv, heads_kv]

    def logits():
        x = (weights.speech_emb[state.tokens] + weights.speech_pos_emb[state.positions])[state.row_request]
        residual = torch.zeros_like(x)
        for i in range(config.num_layers):
            x = ops.add_rms_norm(x, residual, weights.input_norm[i], eps)
            qkv = F.linear(x, weights.qkv[i]).view(state.rows, 1, sum(split), config.head_dim)
            q, k, v = qkv.split(split, dim=-2)
            x, _ = ops.attention_with_kvcache(
                q,
                state.k_cache[i],
                state.v_cache[i],
                k=k,
                v=v,
                cache_seqlens=state.cache_seqlens,
                rotary_cos=state.rotary[0],
                rotary_sin=state.rotary[1],
                cache_batch_idx=state.cache_batch_idx,
                causal=True,
                rotary_interleaved=False,
            )
            x = F.linear(x.reshape(state.rows, -1), weights.out[i])
            x = ops.add_rms_norm(x, residual, weights.post_norm[i], eps)
            x = F.linear(ops.silu_gate(F.linear(x, weights.gate_up[i])), weights.down[i])
        return F.linear(ops.add_rms_norm(x, residual, weights.norm, eps), weights.head).float()

    return logits
