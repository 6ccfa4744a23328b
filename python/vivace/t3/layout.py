"""How Chatterbox's checkpoint tensors become the module's parameters."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vivace.t3.config import T3Config

Shape = tuple[int, ...]

#: In Chatterbox's checkpoints, but of no use for inference: they may be absent.
UNUSED = ("tfmr.embed_tokens.weight", "text_head.weight")


@dataclass(frozen=True)
class Entry:
    """One parameter of the module: Chatterbox's tensors, stacked along their first dimension, viewed as `shape`."""

    parameter: str
    tensors: tuple[tuple[str, Shape], ...]
    shape: Shape


def layout(config: T3Config) -> list[Entry]:
    """Every parameter of the module and where it comes from."""
    hidden = config.hidden_size
    entries = []

    def add(parameter: str, tensors: Mapping[str, Shape], shape: Shape | None = None):
        first = next(iter(tensors.values()))
        stacked = (sum(s[0] for s in tensors.values()), *first[1:])
        entries.append(Entry(parameter, tuple(tensors.items()), shape or stacked))

    def add_linear(parameter: str, tensor: str, rows: int, columns: int):
        add(f"{parameter}.weight", {f"{tensor}.weight": (rows, columns)})
        add(f"{parameter}.bias", {f"{tensor}.bias": (rows,)})

    add_linear("conditioning.speaker", "cond_enc.spkr_enc", hidden, config.speaker_embed_size)
    add("conditioning.emotion.weight", {"cond_enc.emotion_adv_fc.weight": (hidden, 1)})
    queries = (config.perceiver_queries, hidden)
    add("conditioning.perceiver.queries", {"cond_enc.perceiver.pre_attention_query": (1, *queries)}, queries)
    for name in ("weight", "bias"):
        add(f"conditioning.perceiver.norm.{name}", {f"cond_enc.perceiver.attn.norm.{name}": (hidden,)})
    for name in ("to_q", "to_k", "to_v", "proj_out"):
        add_linear(f"conditioning.perceiver.{name}", f"cond_enc.perceiver.attn.{name}", hidden, hidden)

    add("text_emb.weight", {"text_emb.weight": (config.text_vocab_size, hidden)})
    add("text_pos_emb.weight", {"text_pos_emb.emb.weight": (config.text_positions, hidden)})
    add("speech_emb.weight", {"speech_emb.weight": (config.speech_vocab_size, hidden)})
    add("speech_pos_emb.weight", {"speech_pos_emb.emb.weight": (config.speech_positions, hidden)})

    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for i in range(config.num_layers):
        ours, theirs = f"backbone.layers.{i}", f"tfmr.layers.{i}"
        add(f"{ours}.input_norm", {f"{theirs}.input_layernorm.weight": (hidden,)})
        qkv = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
        add(f"{ours}.qkv.weight", {f"{theirs}.self_attn.{name}.weight": (size, hidden) for name, size in qkv})
        add(f"{ours}.out.weight", {f"{theirs}.self_attn.o_proj.weight": (hidden, q_size)})
        add(f"{ours}.post_norm", {f"{theirs}.post_attention_layernorm.weight": (hidden,)})
        gate_up = {
            f"{theirs}.mlp.{name}.weight": (config.intermediate_size, hidden) for name in ("gate_proj", "up_proj")
        }
        add(f"{ours}.gate_up.weight", gate_up)
        add(f"{ours}.down.weight", {f"{theirs}.mlp.down_proj.weight": (hidden, config.intermediate_size)})
    add("backbone.norm", {"tfmr.norm.weight": (hidden,)})
    add("speech_head.weight", {"speech_head.weight": (config.speech_vocab_size, hidden)})
    return entries


def checkpoint_shapes(config: T3Config) -> dict[str, Shape]:
    """Name and shape of every tensor that the module needs from a checkpoint."""
    return {name: shape for entry in layout(config) for name, shape in entry.tensors}


def infer_config(shapes: Mapping[str, Shape], head_dim: int | None = None) -> T3Config:
    """The configuration that a checkpoint's shapes imply; what is missing or contradictory gets Chatterbox's value.

    head_dim cannot be read from shapes; None is Chatterbox's 64.
    """
    default = T3Config(head_dim=head_dim or T3Config.head_dim)

    def size(suffix: str, dimension: int, fallback: int) -> int:
        # Of the layers' shapes the most frequent one: a single misshapen tensor must not decide.
        found = Counter(
            shape[dimension] for name, shape in shapes.items() if name.endswith(suffix) and len(shape) > dimension
        )
        return found.most_common(1)[0][0] if found else fallback

    layers = [
        int(name.split(".")[2]) for name in shapes if name.startswith("tfmr.layers.") and name.split(".")[2].isdigit()
    ]
    return T3Config(
        hidden_size=size("_layernorm.weight", 0, default.hidden_size),
        intermediate_size=size("gate_proj.weight", 0, default.intermediate_size),
        num_layers=max(layers, default=default.num_layers - 1) + 1,
        num_heads=max(1, size("q_proj.weight", 0, default.num_heads * default.head_dim) // default.head_dim),
        num_kv_heads=max(1, size("k_proj.weight", 0, default.num_kv_heads * default.head_dim) // default.head_dim),
        head_dim=default.head_dim,
        text_vocab_size=size("text_emb.weight", 0, default.text_vocab_size),
        max_text_tokens=size("text_pos_emb.emb.weight", 0, default.text_positions) - 2,
        speech_vocab_size=size("speech_emb.weight", 0, default.speech_vocab_size),
        max_speech_tokens=size("speech_pos_emb.emb.weight", 0, default.speech_positions) - 4,
        speaker_embed_size=size("spkr_enc.weight", 1, default.speaker_embed_size),
        perceiver_queries=size("pre_attention_query", 1, default.perceiver_queries),
    )
