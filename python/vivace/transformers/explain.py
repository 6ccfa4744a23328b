"""Which implementation each attention layer of a transformers model uses, and why."""

import torch

from vivace import policy
from vivace.transformers import classes, registry
from vivace.transformers.attention import _why_not_here


def explain(model: torch.nn.Module) -> list[dict[str, str]]:
    """One entry for each attention layer: {"layer": its name in the model, "implementation", "reason"}.

    implementation is what runs for a plain call: "vivace", or what transformers was told or falls back to.
    """
    found = []
    for name, layer in model.named_modules():
        inner = any("attention" in type(child).__name__.lower() for child in layer.children())
        if "attention" in type(layer).__name__.lower() and not inner and any(True for _ in layer.parameters()):
            implementation, reason = _of(layer, model)
            found.append({"layer": name, "implementation": implementation, "reason": reason})
    return found


def _of(layer, model):
    config = getattr(layer, "config", None) or getattr(model, "config", None)
    asked = getattr(config, "_attn_implementation", None)
    ours = classes.is_ours(layer) or asked == registry.NAME
    ours = ours or (asked == registry.LITERAL and registry.rules.literal == "vivace")
    if not ours:
        return str(asked), f'its config says attn_implementation="{asked}"'
    parameter = next(p for p in layer.parameters() if p.is_floating_point())
    reason = _why_not_here(parameter.device, parameter.dtype, _head_dim(layer, config))
    if reason is not None:
        return "sdpa", reason
    if parameter.device.type == "cpu":
        return "vivace", "the operators' CPU implementation"
    return "vivace", policy.choose(parameter.device, parameter.dtype).reason


def _head_dim(layer, config):
    for name in ("head_dim", "attention_head_size"):
        value = getattr(layer, name, None) or getattr(config, name, None)
        if isinstance(value, int):
            return value
    hidden, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 1)
    return hidden // heads
