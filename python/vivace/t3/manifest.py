"""What a .vivace archive says about itself: vivace.json."""

import dataclasses
from pathlib import Path

import torch

from vivace.t3.config import T3Config

FORMAT = 1
OPERATORS = 1  # version of the operators' schemas that the archive's code calls
MANIFEST_NAME = "vivace.json"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(dtype: str | torch.dtype) -> str:
    """The manifest's name of a dtype: bfloat16, float16 or float32.

    Raises:
        ValueError: another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"vivace: dtype is {dtype}, expected one of {', '.join((*DTYPE_ALIASES, *DTYPES))}")
    return name


def version() -> str:
    return (Path(__file__).parents[1] / "VERSION").read_text().strip()


def make_manifest(config: T3Config, dtype: str, source: dict, parameters: int) -> dict:
    """The manifest of a T3 archive, without its digest."""
    scaling = dataclasses.asdict(config.rope_scaling) if config.rope_scaling else None
    return {
        "format": FORMAT,
        "kind": "t3",
        "producer": f"vivace {version()}",
        "operators": OPERATORS,
        "torch": torch.__version__.split("+")[0],
        "dtype": dtype,
        "variant": config.variant,
        "source": source,
        "model": {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
            "max_positions": config.max_positions,
            "parameters": parameters,
        },
        "text": {
            "vocab_size": config.text_vocab_size,
            "start_token": config.start_text_token,
            "stop_token": config.stop_text_token,
            "max_tokens": config.max_text_tokens,
        },
        "speech": {
            "vocab_size": config.speech_vocab_size,
            "start_token": config.start_speech_token,
            "stop_token": config.stop_speech_token,
            "first_invalid_token": config.first_invalid_speech_token,
            "max_tokens": config.max_speech_tokens,
        },
        "conditioning": {
            "speaker_embed_size": config.speaker_embed_size,
            "prompt_tokens": config.prompt_tokens,
            "length": config.cond_length,
            "emotion": True,
        },
        "alignment_heads": [list(pair) for pair in config.alignment_heads],
        "defaults": {
            "temperature": 0.8,
            "top_p": 1.0,
            "min_p": 0.05,
            # Chatterbox 0.1.7's generate(): multilingual repeats more.
            "repetition_penalty": 1.2 if config.variant == "english" else 2.0,
            "cfg_weight": 0.5,
            "exaggeration": 0.5,
        },
    }
