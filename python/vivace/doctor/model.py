"""What a given model would run on, layer by layer, and why not on ours."""

from pathlib import Path
from typing import Any

from vivace.doctor.attempt import attempt, first_line

#: Said of layers whose configuration asks for attention weights.
WEIGHTS = "output_attentions is on: flash kernels return no attention weights"


def examine(model: Any) -> dict[str, Any]:
    """{"model", "kind", "layers": [{"layer", "implementation", "reason"}], "advice": [...]}, or {"model", "error"}.

    Args:
        model: a module or Chatterbox pipeline; a path: a .vivace file, a T3 checkpoint, a folder of either or of a
            transformers model; or a Hub id.
    """
    name = model if isinstance(model, (str, Path)) else type(model).__name__
    try:
        answer = _of_path(str(model)) if isinstance(model, (str, Path)) else _of_object(model)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return {"model": str(name), "error": first_line(error)}
    return {"model": str(name), **answer}


def _of_object(model: Any) -> dict[str, Any]:
    t3 = attempt(lambda: _t3_of(model))
    if not isinstance(t3, dict):
        return _of_t3(t3)
    import torch

    module = model if isinstance(model, torch.nn.Module) else getattr(model, "model", None)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"a {type(model).__name__} is neither a torch module nor a Chatterbox pipeline")
    return _of_transformers(module)


def _t3_of(model: Any) -> Any:
    from vivace.chatterbox.source import find_t3

    return find_t3(model)


def _of_t3(t3: Any) -> dict[str, Any]:
    """A T3 module: what accelerate() would choose, or has chosen."""
    from vivace.chatterbox.choice import choose
    from vivace.chatterbox.session import session_of
    from vivace.chatterbox.source import ModuleWeights, config_of, device_of, watches_alignment

    session = session_of(t3)
    config = config_of(t3, ModuleWeights(t3))
    choice = session.choice if session else choose(device_of(t3), t3.tfmr.norm.weight.dtype, "auto", "auto")
    asked = getattr(t3.tfmr.config, "_attn_implementation", None)
    dtype = str(t3.tfmr.norm.weight.dtype).removeprefix("torch.")
    advice = []
    if session is None:
        advice.append(f"as it is, T3 runs on transformers' {asked} in {dtype}; to use vivace: vivace.accelerate(tts)")
    return {
        "kind": "Chatterbox T3",
        "accelerated": session is not None,
        "alignment": watches_alignment(t3),
        **_t3_layers(config.num_layers, choice),
        "advice": advice,
    }


def _t3_layers(count: int, choice: Any) -> dict[str, Any]:
    return {
        "dtype": str(choice.dtype).removeprefix("torch."),
        "loop": choice.loop,
        "layers": [
            {"layer": f"tfmr.layers.{i}", "implementation": choice.attention, "reason": choice.reason}
            for i in range(count)
        ],
    }


def _of_transformers(module: Any) -> dict[str, Any]:
    from vivace.transformers import explain

    layers = explain(module)
    advice = []
    for layer in layers:
        owner = module.get_submodule(layer["layer"]) if layer["layer"] else module
        config = getattr(owner, "config", None) or getattr(module, "config", None)
        if getattr(config, "output_attentions", False):
            layer |= {"implementation": "eager", "reason": WEIGHTS}
    if not layers:
        raise ValueError(f"{type(module).__name__} has no attention layer that vivace knows")
    if any(layer["implementation"] != "vivace" for layer in layers):
        asked = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if asked != "vivace":
            advice.append(
                'import vivace; vivace.enable("auto") before the model is built, or '
                'vivace.transformers.register() and model.set_attn_implementation("vivace")'
            )
        if any(layer["reason"] == WEIGHTS for layer in layers):
            advice.append("model.config.output_attentions = False, where nothing needs the attention weights")
        if any("float32" in layer["reason"] for layer in layers):
            advice.append("load the model in bfloat16: from_pretrained(..., dtype=torch.bfloat16)")
    return {"kind": "transformers", "layers": layers, "advice": advice}


def _of_path(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".vivace":
        return _of_archive(path)
    if path.is_dir() and (path / "config.json").is_file():
        return _of_config(str(path))
    if path.exists():
        return _of_checkpoint(path)
    return _of_config(name)


def _of_archive(path: Path) -> dict[str, Any]:
    from vivace.chatterbox.choice import choose
    from vivace.policy import default_device
    from vivace.t3 import read_manifest

    manifest = read_manifest(path)
    choice = choose(default_device(), _dtype(manifest["dtype"]), "auto", manifest["dtype"])
    return {"kind": "vivace archive", **_t3_layers(manifest["model"]["num_layers"], choice), "advice": []}


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """A T3 checkpoint, or a folder of Chatterbox's files, from the shapes of its tensors."""
    import torch

    from vivace.chatterbox.choice import choose
    from vivace.policy import default_device
    from vivace.t3 import checkpoint_config, open_weights
    from vivace.t3.locate import locate

    config = checkpoint_config(open_weights(locate(path, None, False).model))
    choice = choose(default_device(), torch.float32, "auto", "auto")
    return {"kind": f"{config.variant} T3 checkpoint", **_t3_layers(config.num_layers, choice), "advice": []}


def _of_config(name: str) -> dict[str, Any]:
    """A transformers model by its configuration: built without weights, as from_pretrained would build it."""
    import torch
    from transformers import AutoConfig, AutoModel

    from vivace.policy import choose, default_device, why_not

    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(f"there is no such file or folder, and on the Hub: {first_line(error)}") from error
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    answer = _of_transformers(model)
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    dtype, device = _dtype(stored), default_device()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    reason = why_not(device, dtype, head_dim)
    for layer in answer["layers"]:
        if layer["reason"] == WEIGHTS:
            continue
        # As it would be with vivace asked for; the module on the meta device has no GPU to speak of.
        layer["implementation"], layer["reason"] = (
            ("vivace", choose(device, dtype, head_dim=head_dim).reason + ", once vivace.enable() was called")
            if reason is None
            else (layer["implementation"], reason)
        )
    return {**answer, "dtype": str(dtype).removeprefix("torch.")}


def _dtype(value: Any) -> Any:
    import torch

    return getattr(torch, str(value).removeprefix("torch."))
