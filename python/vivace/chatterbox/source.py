"""Chatterbox's T3 as an object in memory: finding it, its configuration, its weights."""

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn

from vivace.t3 import CheckpointError, RopeScaling, T3Config, checkpoint_config
from vivace.t3.config import ALIGNMENT_HEADS

_SUPPORTED = "a ChatterboxTTS, a ChatterboxMultilingualTTS or a T3 of either"


def find_t3(model: Any) -> nn.Module:
    """The T3 of a Chatterbox pipeline, or the T3 that was given.

    Raises:
        TypeError: it is neither. ValueError: it is the GPT-2 T3 of Turbo or Nano.
    """
    t3 = getattr(model, "t3", model)
    if not isinstance(t3, nn.Module) or not all(
        hasattr(t3, name) for name in ("tfmr", "cond_enc", "speech_head", "hp")
    ):
        raise TypeError(f"vivace.accelerate: model is of type {type(model).__name__}, expected {_SUPPORTED}")
    if getattr(t3, "is_gpt", False) or not hasattr(t3.tfmr, "layers"):
        raise ValueError(
            f"vivace.accelerate: model is a {type(model).__name__} with a {type(t3.tfmr).__name__} (Chatterbox Turbo "
            f"or Nano), expected {_SUPPORTED}: only the Llama T3 is supported"
        )
    return t3


def device_of(t3: nn.Module) -> torch.device:
    """The one device that holds T3.

    Raises:
        ValueError: its tensors are on several devices, or have no values (the meta device).
    """
    devices: dict[torch.device, list[str]] = {}
    for name, parameter in t3.named_parameters():
        devices.setdefault(parameter.device, []).append(name)
    if len(devices) != 1:
        found = "; ".join(f"{device}: {len(names)} tensors ({names[0]}, ...)" for device, names in devices.items())
        raise ValueError(f"vivace.accelerate: T3 is on {len(devices)} devices ({found}), expected one: t3.to(device)")
    device = next(iter(devices))
    if device.type == "meta":
        raise ValueError("vivace.accelerate: T3's weights are on the meta device: they have no values; load it first")
    return device


class ModuleWeights:
    """A T3's tensors as vivace.t3 reads a checkpoint's."""

    def __init__(self, t3: nn.Module):
        # T3.inference leaves a module around the decoder behind: the same tensors once more.
        self.state = {name: t for name, t in t3.state_dict().items() if not name.startswith("patched_model.")}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        # The form of a file's source; nobody reads a digest of what was never a file.
        self.source = {"name": f"{type(t3).__module__}.{type(t3).__qualname__}", "sha256": "0" * 64}

    def read(self, name: str) -> Tensor:
        return self.state[name].detach().cpu()


def config_of(t3: nn.Module, weights: ModuleWeights) -> T3Config:
    """The configuration of a T3, all its tensors checked against it.

    Raises:
        CheckpointError: the module is not a T3 that vivace computes; the text names the difference.
    """
    hp, llama = t3.hp, t3.cfg
    for owner, name, expected in (
        (hp, "input_pos_emb", "learned"),
        (hp, "encoder_type", "voice_encoder"),
        (hp, "use_perceiver_resampler", True),
        (hp, "emotion_adv", True),
        (llama, "hidden_act", "silu"),
    ):
        found = getattr(owner, name, expected)
        if found != expected:
            raise CheckpointError(f"vivace: T3's {name} is {found!r}, expected {expected!r}")
    heads = llama.num_attention_heads
    config = checkpoint_config(weights, getattr(llama, "head_dim", None) or llama.hidden_size // heads)
    theta, scaling = rope(llama)
    config = dataclasses.replace(
        config,
        rms_norm_eps=llama.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        start_text_token=hp.start_text_token,
        stop_text_token=hp.stop_text_token,
        start_speech_token=hp.start_speech_token,
        stop_speech_token=hp.stop_speech_token,
        prompt_tokens=hp.speech_cond_prompt_len or config.prompt_tokens,  # the usual length; T3 takes any
        perceiver_heads=t3.cond_enc.perceiver.attn.num_heads,
    )
    if (config.num_heads, config.num_layers) != (heads, llama.num_hidden_layers):
        raise CheckpointError(
            f"vivace: T3's tensors are those of {config.num_layers} layers with {config.num_heads} heads, its "
            f"configuration says {llama.num_hidden_layers} with {heads}"
        )
    return config


def rope(llama: Any) -> tuple[float, RopeScaling | None]:
    """Base and scaling of a LlamaConfig: `rope_parameters` since transformers 5, two attributes before."""
    parameters = getattr(llama, "rope_parameters", None)
    if parameters is None:
        parameters = {**(getattr(llama, "rope_scaling", None) or {}), "rope_theta": llama.rope_theta}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(parameters["rope_theta"]), None
    if kind != "llama3":
        raise CheckpointError(f"vivace: T3's rope_type is {kind!r}, expected 'llama3' or 'default'")
    return float(parameters["rope_theta"]), RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=int(parameters["original_max_position_embeddings"]),
    )


def watches_alignment(t3: nn.Module) -> bool:
    """Whether T3.inference of the installed Chatterbox runs its alignment analyzer for this model.

    It does for multilingual models through 0.1.7, with the heads that vivace watches; later versions have none.
    """
    if not getattr(t3.hp, "is_multilingual", False):
        return False
    analyzer = getattr(sys.modules.get(type(t3).__module__), "AlignmentStreamAnalyzer", None)
    if analyzer is None:
        return False
    heads = getattr(sys.modules.get(analyzer.__module__), "LLAMA_ALIGNED_HEADS", None)
    return heads is not None and tuple(map(tuple, heads)) == ALIGNMENT_HEADS
