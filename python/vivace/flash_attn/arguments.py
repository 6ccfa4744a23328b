"""Arguments as flash-attn takes them, made into ours."""

import contextlib

import torch

from vivace.autograd import deterministic_backward

_DTYPES = (torch.float16, torch.bfloat16)


def check_dtype(function: str, q: torch.Tensor) -> None:
    """On CUDA float16 and bfloat16 alone, as flash-attn; on the CPU what the operators take."""
    if q.is_cuda and q.dtype not in _DTYPES:
        raise RuntimeError(
            f"vivace.flash_attn.{function}: q is {str(q.dtype).removeprefix('torch.')}, expected float16 or bfloat16 "
            "(load or cast the model to one)"
        )


def pair(window_size) -> tuple[int, int]:
    """(left, right) from integers or 0-d tensors; anything negative, or None, is open."""
    return tuple(-1 if side is None or int(side) < 0 else int(side) for side in window_size)


def softcap_of(value) -> float:
    return 0.0 if value is None else float(value)


def backward_mode(deterministic: bool, *tensors: torch.Tensor):
    """The context of a call whose backward shall be deterministic, where there is one."""
    needed = deterministic and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return deterministic_backward() if needed else contextlib.nullcontext()
