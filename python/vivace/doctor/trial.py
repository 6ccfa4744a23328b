"""A T3 built, run and measured here: initialisation, forward, memory, shapes, and tokens through accelerate().

Random weights; Chatterbox's own T3 where it is installed, else vivace's.
"""

import importlib.util
import time
from typing import Any

from vivace.doctor.attempt import first_line

_TOKENS = 50


def trial(shape: str = "real") -> dict[str, Any]:
    """{"steps": [{"step", "ok", ...}], "ok"}. A step that fails ends it; its error is there.

    Args:
        shape: "real" (530 M parameters: 2.2 GB of memory in float32) or "tiny".
    """
    steps: list[dict[str, Any]] = []
    state: dict[str, Any] = {"shape": shape}
    chatterbox = importlib.util.find_spec("chatterbox") is not None
    plan = (
        (("model initialisation", _build), ("forward", _forward), ("generation", _generate))
        if chatterbox
        else (("model initialisation", _build_ours), ("forward", _forward_ours))
    )
    for name, step in plan:
        began = time.monotonic()
        try:
            steps.append({"step": name, "ok": True, **step(state), "seconds": round(time.monotonic() - began, 2)})
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            steps.append({"step": name, "ok": False, "error": first_line(error)})
            break
    return {"t3": "chatterbox" if chatterbox else "vivace", "steps": steps, "ok": steps[-1]["ok"]}


def _device() -> Any:
    from vivace.policy import default_device

    return default_device()


def _memory(device: Any) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        return {}
    return {"gpu_gib": round(torch.cuda.memory_allocated(device) / 2**30, 2)}


def _build(state: dict[str, Any]) -> dict[str, Any]:
    """Chatterbox's T3 of the wanted shape, with weights as its constructor draws them."""
    import torch
    from chatterbox.models.t3 import t3 as module

    from vivace.bench.chatterbox import sized
    from vivace.t3 import preset

    device = _device()
    with sized(module, preset(state["shape"])):
        t3 = module.T3(module.T3Config.english_only()).to(device).eval()
    state |= {"t3": t3, "device": device}
    parameters = sum(p.numel() for p in t3.parameters())
    dtype = next(t3.tfmr.parameters()).dtype
    return {
        "device": str(device),
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": t3.tfmr.config._attn_implementation,
        "torch": torch.__version__,
        **_memory(device),
    }


def _cond(state: dict[str, Any]) -> Any:
    import torch
    from chatterbox.models.t3.modules.cond_enc import T3Cond

    generator = torch.Generator().manual_seed(0)
    cond = T3Cond(
        speaker_emb=torch.nn.functional.normalize(torch.rand(1, 256, generator=generator)),
        cond_prompt_speech_tokens=torch.randint(6561, (1, 150), generator=generator),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )
    return cond.to(device=state["device"])


def _forward(state: dict[str, Any]) -> dict[str, Any]:
    """T3.forward, every shape compared with what it must be."""
    import torch

    t3, device = state["t3"], state["device"]
    text = torch.tensor([[255, *range(1, 31), 0]], device=device)
    speech = torch.tensor([[6561, *range(100, 110)]], device=device)
    with torch.inference_mode():
        out = t3(
            t3_cond=_cond(state),
            text_tokens=text,
            text_token_lens=torch.tensor([text.size(1)]),
            speech_tokens=speech,
            speech_token_lens=torch.tensor([speech.size(1)]),
        )
    hidden = t3.dim
    expected = {
        "text_logits": [1, text.size(1), t3.hp.text_tokens_dict_size],
        "text_latents": [1, text.size(1), hidden],
        "speech_logits": [1, speech.size(1), t3.hp.speech_tokens_dict_size],
        "speech_latents": [1, speech.size(1), hidden],
        "hidden_states": [1, 34 + text.size(1) + speech.size(1), hidden],
    }
    for name, shape in expected.items():
        if list(out[name].shape) != shape:
            raise AssertionError(f"{name} has shape {list(out[name].shape)}, expected {shape}")
        if not torch.isfinite(out[name]).all():
            raise AssertionError(f"{name} has NaN or Inf")
    return {"shapes": expected, **_memory(device)}


def _generate(state: dict[str, Any]) -> dict[str, Any]:
    """Speech tokens through accelerate(), and the model as it was afterwards."""
    import torch

    from vivace.chatterbox import accelerate, describe, restore

    t3, device = state["t3"], state["device"]
    text = torch.tensor([[255, *range(1, 31), 0]] * 2, device=device)
    options = {"text_tokens": text, "max_new_tokens": _TOKENS, "stop_on_eos": True}
    accelerate(t3)
    try:
        found = describe(t3)
        t3.inference(t3_cond=_cond(state), **options)  # captures, loads
        began = time.monotonic()
        tokens = t3.inference(t3_cond=_cond(state), **options)
        seconds = time.monotonic() - began
        memory = _memory(device)
    finally:
        restore(t3)
    if tokens.dim() != 2 or tokens.size(0) != 1 or not 1 <= tokens.size(1) <= _TOKENS:
        raise AssertionError(f"tokens have shape {list(tokens.shape)}, expected [1, 1..{_TOKENS}]")
    return {
        "loop": found["loop"],
        "attention": found["attention"],
        "dtype": found["dtype"],
        "reason": found["reason"],
        "tokens": tokens.size(1),
        "ms_per_token": round(1e3 * seconds / tokens.size(1), 3),
        **memory,
    }


def _build_ours(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    from vivace.chatterbox.choice import choose
    from vivace.t3 import RandomWeights, load_model, preset

    device = _device()
    choice = choose(device, torch.float32, "auto", "auto")
    if choice.attention != "vivace":
        raise RuntimeError(f"vivace's T3 needs its operators: {choice.reason}")
    config = preset(state["shape"])
    model = load_model(RandomWeights(config, 0), config, choice.dtype).to(device)
    state |= {"config": config, "model": model, "device": device}
    return {
        "device": str(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(choice.dtype).removeprefix("torch."),
        "attention": choice.attention,
        **_memory(device),
    }


def _forward_ours(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    from vivace import library

    library.load()
    config, model, device = state["config"], state["model"], state["device"]
    with torch.inference_mode():
        cond = model.encode_voice(
            torch.rand(1, config.speaker_embed_size, device=device),
            torch.randint(6561, (1, 150), device=device),
            0.5,
        )
        prompt = model.embed_prompt(cond, torch.tensor([255, *range(1, 31), 0], device=device), False)
        length = prompt.size(0)
        k_cache, v_cache = model.new_cache(1, 256)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        starts = torch.tensor([0, length], dtype=torch.int32, device=device)
        hidden = model(prompt, k_cache, v_cache, zero, zero, starts, length, None)
        logits = model.logits(hidden[-1:])
    expected = {"hidden": [34 + 32 + 2, config.hidden_size], "logits": [1, config.speech_vocab_size]}
    for name, tensor in (("hidden", hidden), ("logits", logits)):
        if list(tensor.shape) != expected[name] or not torch.isfinite(tensor).all():
            raise AssertionError(f"{name} has shape {list(tensor.shape)}, expected {expected[name]} and finite values")
    return {"shapes": expected, **_memory(device)}
