"""Which loop generates, at which precision, and why: the words auto, flash_attention_2, sdpa and eager for T3."""

import logging
from typing import NamedTuple

import torch

from vivace import policy
from vivace.t3.manifest import DTYPES, dtype_name


class Choice(NamedTuple):
    """What runs T3.

    Attributes:
        loop: "engine" (C++), "operators" (the same operators, from Python) or "transformers" (T3's own module).
        attention: "vivace", "sdpa" or "eager".
        reason: why not ours, or what allows ours.
    """

    loop: str
    attention: str
    dtype: torch.dtype
    reason: str


def choose(device: torch.device, t3_dtype: torch.dtype, wanted: str, dtype: str | torch.dtype) -> Choice:
    """Picks the loop for T3.

    Args:
        device: where T3 shall run.
        t3_dtype: of its weights as they are.
        wanted: "auto" takes our loop wherever it runs, else sdpa, else eager; "flash_attention_2" our kernel or an
            error; "sdpa" and "eager" T3's own module with transformers' attention.
        dtype: "auto": bfloat16 on a GPU of compute capability 8.0 or newer, else float32 with our loop on a CPU, and
            the weights' own with transformers.

    Raises:
        ValueError: `wanted` or `dtype` is none of these, or flash_attention_2 cannot be.
    """
    policy.check_wanted(wanted)
    automatic = isinstance(dtype, str) and dtype == "auto"
    given = None if automatic else DTYPES[dtype_name(dtype)]
    if wanted in ("sdpa", "eager"):
        return Choice("transformers", wanted, given or t3_dtype, f"{wanted} was asked for")
    if device.type == "cpu" and wanted == "auto":
        why = _why_no_operators()
        if why is not None:
            return Choice("transformers", "sdpa", given or t3_dtype, why)
        loop, why = _loop()
        return Choice(loop, "vivace", given or torch.float32, why or "the operators' CPU implementation")
    runs = given or (torch.bfloat16 if device.type == "cuda" else t3_dtype)
    # The engine computes in float32 too, with kernels that need no tensor cores.
    asked = None if given == torch.float32 and wanted == "auto" else runs
    choice = policy.choose(device, asked, wanted)
    if choice.implementation != "vivace":
        return Choice("transformers", choice.implementation, given or t3_dtype, choice.reason)
    loop, why = _loop()
    return Choice(loop, "vivace", given or torch.bfloat16, why or choice.reason)


def announce(choice: Choice, what: str) -> None:
    """Logs what runs and why, once: a warning where it is neither ours nor asked for."""
    names = {
        "engine": "vivace's engine",
        "operators": "vivace's operators from Python",
        "transformers": f"transformers' {choice.attention}",
    }
    asked = choice.loop == "engine" or choice.reason.endswith("was asked for")
    policy.log_once(
        logging.INFO if asked else logging.WARNING,
        f"{what} runs on {names[choice.loop]} in {dtype_name(choice.dtype)} ({choice.reason})",
    )


def _loop() -> tuple[str, str | None]:
    """The engine, or where it does not load the loop in Python and why."""
    from vivace import extension

    try:
        extension.load()
    except Exception as error:  # ImportError, or whatever a broken library raises
        return "operators", f"the engine does not load: {error}"
    return "engine", None


def _why_no_operators() -> str | None:
    from vivace import library

    reason = library.unavailable_reason()
    return None if reason is None else f"the operators do not load: {reason}"
