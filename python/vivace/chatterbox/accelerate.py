"""accelerate() and restore()."""

import threading
from typing import Any, TypeVar

import torch
from torch import nn

from vivace import policy
from vivace.chatterbox import pipeline
from vivace.chatterbox.choice import Choice, announce, choose
from vivace.chatterbox.errors import memory_error
from vivace.chatterbox.session import ATTRIBUTE, Session, session_of
from vivace.chatterbox.source import ModuleWeights, config_of, device_of, find_t3, watches_alignment

Model = TypeVar("Model")

_CAPACITY = 1536  # positions of a row: 1000 tokens, as generate() asks for, after a prompt of 500
_lock = threading.RLock()


def accelerate(
    model: Model,
    *,
    implementation: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    max_requests: int | None = None,
    capacity: int | None = None,
    rng: str = "auto",
    keep_weights: bool = False,
    cuda_graphs: bool = True,
) -> Model:
    """Lets a Chatterbox model generate on vivace; the rest of its pipeline, the watermark too, stays as it is.

    Args:
        model: a ChatterboxTTS, a ChatterboxMultilingualTTS, or the T3 of one; changed in place.
        implementation: "auto": vivace's engine where it runs, else T3's own module on sdpa, else eager; which and why
            is logged. "flash_attention_2": vivace's kernels on a CUDA GPU, or an error. "sdpa", "eager": T3's own
            module.
        dtype: of T3's weights and activations: "auto" (bfloat16 on CUDA, float32 on a CPU), "bf16", "fp16", "fp32".
            Logits are float32.
        device: where T3 runs; None: where it is.
        max_requests: generating at once; None: one, and more when generate_batch asks for more.
        capacity: positions of a row of the KV cache, prompt and tokens; None: 1536, and more when a request needs it.
        rng: "philox" draws on the device, from a seed that torch's generator gives; "torch" draws as Chatterbox does,
            token for token the same after the same torch.manual_seed in the same dtype, and slower on CUDA; "auto":
            torch on a CPU, philox on CUDA.
        keep_weights: leave T3's own weights where they are. Otherwise those of its decoder wait on the CPU.
        cuda_graphs: replay captured steps on CUDA.

    Returns:
        The model. With a pipeline it has two methods more, generate_batch and stream_tokens.

    Raises:
        TypeError, ValueError: the model is not one of these, or an option is out of range.
        ValueError: implementation is flash_attention_2 and cannot be; CheckpointError (a ValueError): T3 is not of
            the shape that vivace computes. torch.OutOfMemoryError: no room for weights and cache.
        Whatever is raised, the model is as it was, or without the acceleration that other options were to take the
        place of.

    Accelerating twice changes nothing, or with other options is as after restore(). Two threads may call generate().
    """
    options = {
        "implementation": implementation,
        "dtype": dtype,
        "device": None if device is None else str(device),
        "max_requests": max_requests,
        "capacity": capacity,
        "rng": rng,
        "keep_weights": keep_weights,
        "cuda_graphs": cuda_graphs,
    }
    _check_options(options)
    with _lock:
        t3 = find_t3(model)
        before = session_of(t3)
        if before is not None:
            if before.options == options:
                pipeline.attach(model, before)
                return model
            where = before.home if device is None else torch.device(device)
            choose(where, t3.tfmr.norm.weight.dtype, implementation, dtype)  # what cannot be leaves the first in force
            restore(model)
        home = device_of(t3)
        where = home if device is None else torch.device(device)
        choice = choose(where, t3.tfmr.norm.weight.dtype, implementation, dtype)
        if choice.loop == "transformers" and where != home:
            raise ValueError(
                f"vivace.accelerate: device is {where} and T3 is on {home}; with {choice.attention} T3's own module "
                f"runs ({choice.reason}): move T3, or leave device out"
            )
        session = Session(t3, where, choice, options)
        try:
            _install(model, session)
        except BaseException as error:
            _take_back(session, error)
            raise memory_error(error, "vivace.accelerate: no room") or error from None
    announce(choice, f"{type(model).__name__}")
    return model


def restore(model: Model) -> Model:
    """Takes back what accelerate() did: every attribute and every weight is as it was. Does nothing to other models.

    Raises:
        torch.OutOfMemoryError: there is no room for T3's weights on their device; free some and call it again.
    """
    with _lock:
        session = _session_of_any(model)
        if session is not None:
            try:
                session.close()
            except Exception as error:
                raise memory_error(error, "vivace.restore: no room for T3's weights on their device") or error from None
    return model


def is_accelerated(model: Any) -> bool:
    """Whether accelerate() is in force for a model; False for what it could not be."""
    return _session_of_any(model) is not None


def describe(model: Any) -> dict[str, Any]:
    """What runs an accelerated model: loop, attention, dtype, device, reason, and the engine's counters."""
    session = session_of(find_t3(model))
    if session is None:
        raise ValueError("vivace: the model is not accelerated: vivace.accelerate(model)")
    return {
        "loop": session.choice.loop,
        "attention": session.choice.attention,
        "dtype": str(session.choice.dtype).removeprefix("torch."),
        "device": str(session.device),
        "reason": session.choice.reason,
        "parked_bytes": session.parking.bytes,
        "engine": session.backend.stats() if session.backend is not None else {},
    }


def _session_of_any(model: Any) -> Session | None:
    t3 = getattr(model, "t3", model)
    return session_of(t3) if isinstance(t3, nn.Module) else None


def _install(model: Any, session: Session) -> None:
    """Builds the backend, then changes the model."""
    t3, choice = session.t3, session.choice
    config = config_of(t3, ModuleWeights(t3))
    session.backend = _make_backend(session, config, choice)
    session.patches.set(t3, ATTRIBUTE, session)
    session.patches.set(t3, "inference", session.inference)
    pipeline.attach(model, session)


def _make_backend(session: Session, config, choice: Choice) -> Any:
    t3, options = session.t3, session.options
    aligned = watches_alignment(t3)
    common = {"device": session.device, "dtype": choice.dtype, "aligned": aligned}
    if choice.loop == "transformers":
        from vivace.chatterbox.llama_rows import set_attention
        from vivace.chatterbox.python_backend import LlamaBackend

        if choice.dtype != t3.tfmr.norm.weight.dtype:
            session.parking.cast(t3.tfmr, choice.dtype)
        set_attention(t3, choice.attention, session.patches)
        return LlamaBackend(t3, config, **common)

    if not options["keep_weights"]:
        session.parking.move(t3.tfmr)  # first, so that both copies are never on the GPU together
        if session.home.type == "cuda":
            torch.cuda.empty_cache()
    if choice.loop == "operators":
        from vivace.chatterbox.python_backend import OperatorBackend

        return OperatorBackend(t3, config, **common)
    from vivace.chatterbox.engine_backend import EngineBackend

    return EngineBackend(
        t3,
        config,
        **common,
        capacity=options["capacity"] or _CAPACITY,
        max_requests=options["max_requests"] or 1,
        fixed_capacity=options["capacity"] is not None,
        fixed_requests=options["max_requests"] is not None,
        rng=options["rng"],
        cuda_graphs=options["cuda_graphs"],
    )


def _take_back(session: Session, error: BaseException) -> None:
    try:
        session.close()
    except Exception as second:  # the first error is the cause
        policy.logger.error("vivace: after %s, taking accelerate() back failed: %s", error, second)


def _check_options(options: dict[str, Any]) -> None:
    if options["rng"] not in ("auto", "philox", "torch"):
        raise ValueError(f"vivace.accelerate: rng is {options['rng']!r}, expected auto, philox or torch")
    for name in ("max_requests", "capacity"):
        value = options[name]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"vivace.accelerate: {name} is {value!r}, expected a positive number or None")
