"""Which attention runs, and why: `choose` for the words auto, flash_attention_2, sdpa and eager.

    auto                vivace where GPU and dtype allow, else sdpa, else eager
    flash_attention_2   vivace, or an error that says why it cannot be
    sdpa, eager         that one

torch is imported when a function is called, not before.
"""

import functools
import logging
import threading
from typing import NamedTuple

logger = logging.getLogger("vivace")

#: What a user may ask for.
WANTED = ("auto", "flash_attention_2", "sdpa", "eager")
#: The oldest GPUs that the CUDA kernels run on.
MINIMUM_CAPABILITY = (8, 0)
#: The largest head dimension of the kernels.
MAXIMUM_HEAD_DIM = 256

_said: set[str] = set()
_lock = threading.Lock()


class UnavailableError(ValueError):
    """flash_attention_2 was asked for and cannot be; the text says why."""


class Choice(NamedTuple):
    """What was chosen and why."""

    implementation: str  # "vivace", "sdpa" or "eager"
    reason: str  # one sentence: why not ours, or what allows ours


def choose(device=None, dtype=None, wanted: str = "auto", *, head_dim: int | None = None) -> Choice:
    """Picks the attention implementation for tensors of a device and dtype.

    Args:
        device: torch.device or its name; None: the current CUDA device where torch sees one, else the CPU.
        dtype: torch.dtype of q, k and v; None: left out of the question.
        wanted: "auto", "flash_attention_2", "sdpa" or "eager".
        head_dim: of q and k; None: left out of the question.

    Returns:
        (implementation, reason); implementation is "vivace", "sdpa" or "eager".

    Raises:
        UnavailableError: wanted is flash_attention_2 and `why_not` has an answer. A ValueError.
        ValueError: wanted is none of the four.
    """
    check_wanted(wanted)
    if wanted in ("sdpa", "eager"):
        return Choice(wanted, f"{wanted} was asked for")
    reason = why_not(device, dtype, head_dim)
    if reason is None:
        return Choice("vivace", _what_allows_it(device, dtype))
    if wanted == "flash_attention_2":
        raise UnavailableError(f"vivace: flash_attention_2 was asked for, but {reason}; ask for auto, sdpa or eager")
    return Choice("sdpa" if _has_sdpa() else "eager", reason)


def check_wanted(wanted: str) -> None:
    """Raises ValueError unless wanted is one of WANTED."""
    if wanted not in WANTED:
        raise ValueError(f"vivace: wanted is {wanted!r}, expected one of {', '.join(WANTED)}")


def why_not(device=None, dtype=None, head_dim: int | None = None) -> str | None:
    """Why the CUDA kernels do not run attention on such tensors, in one clause; None where they do. Never raises."""
    try:
        return _why_not(device, dtype, head_dim)
    except Exception as error:  # a broken driver, say: an answer, not an end
        return f"looking for a GPU failed: {error}"


def _why_not(device, dtype, head_dim):
    import torch

    device = default_device() if device is None else torch.device(device)
    if device.type != "cuda":
        reason = _why_no_gpu()
        return f"the tensors are on {device}, and the kernels need a CUDA device" if reason is None else reason
    reason = _why_no_gpu() or _why_not_this_gpu(torch.cuda.current_device() if device.index is None else device.index)
    if reason is not None:
        return reason
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"the tensors are {name}, and flash kernels take float16 and bfloat16: load or cast the model to one"
    if head_dim is not None and head_dim > MAXIMUM_HEAD_DIM:
        return f"head_dim is {head_dim}, and the kernels go up to {MAXIMUM_HEAD_DIM}"
    return None


def default_device():
    """The current CUDA device where torch sees one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.lru_cache(maxsize=1)
def _why_no_gpu():
    import torch

    if getattr(torch.version, "hip", None):
        return "this torch is for AMD GPUs, and the kernels are for NVIDIA's"
    if torch.cuda.is_available():
        return None
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        return "this is an Apple GPU, and the kernels are for NVIDIA's"
    if torch.version.cuda is None:
        return "this torch was built for the CPU"
    return "torch sees no NVIDIA GPU or driver"


@functools.lru_cache(maxsize=64)
def _why_not_this_gpu(index):
    import torch

    if index >= torch.cuda.device_count():
        return f"there is no cuda:{index}, torch sees {torch.cuda.device_count()} GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        name, needed = torch.cuda.get_device_name(index), ".".join(map(str, MINIMUM_CAPABILITY))
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and the kernels need {needed} or newer"
    return _why_no_operators()


@functools.lru_cache(maxsize=1)
def _why_no_operators():
    from vivace import library

    reason = library.unavailable_reason()
    if reason is not None:
        return f"the operators do not load: {reason}"
    from vivace import ops

    if not ops.build_info().get("cuda"):
        return "the operator library was built without CUDA"
    return None


def forget() -> None:
    """Drops what was remembered about the machine and what was said (for tests)."""
    for function in (_why_no_gpu, _why_not_this_gpu, _why_no_operators):
        function.cache_clear()
    with _lock:
        _said.clear()


def _what_allows_it(device, dtype):
    import torch

    device = default_device() if device is None else torch.device(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    tail = "" if dtype is None else f", {str(dtype).removeprefix('torch.')}"
    return f"{name}, compute capability {major}.{minor}{tail}"


def _has_sdpa():
    import torch

    return hasattr(torch.nn.functional, "scaled_dot_product_attention")


def announce(choice: Choice, what: str) -> None:
    """Logs the choice, once for each text: as information where it is ours or was asked for, else as a warning."""
    chosen = choice.implementation == "vivace" or choice.reason.endswith("was asked for")
    log_once(logging.INFO if chosen else logging.WARNING, f"{what}: {choice.implementation} ({choice.reason})")


def log_once(level: int, message: str) -> None:
    """Logs a message of the vivace logger the first time it comes."""
    with _lock:
        if message in _said:
            return
        _said.add(message)
    logger.log(level, "vivace: %s", message)
