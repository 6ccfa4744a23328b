"""Failures in words that say what to do."""

import torch

OutOfMemory: type[Exception] = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError


#: Of one while generating.
OUT_OF_MEMORY = "vivace: out of memory while generating; the model is usable"
#: Of a request that another thread's restore() has ended, or that came after it.
RESTORED = "vivace: this T3 was restored while it was in use"

_WHAT_TO_DO = (
    "Lower max_requests or capacity of vivace.accelerate(), give shorter or fewer texts, or free memory of other "
    "programs"
)


def memory_error(error: Exception, what: str) -> Exception | None:
    """An OutOfMemoryError that says `what` and what to do, where `error` is one in any form; else None. One that has
    come from here stays as it is."""
    text = str(error)
    if text.endswith(_WHAT_TO_DO):
        return error
    if not isinstance(error, OutOfMemory) and not any(
        sign in text
        for sign in (
            "out of memory",
            "STATUS_ALLOC_FAILED",
            "lower capacity or max_requests",
            "DefaultCPUAllocator: can't allocate",
        )
    ):
        return None
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return OutOfMemory(f"{what}: {first}. {_WHAT_TO_DO}")
