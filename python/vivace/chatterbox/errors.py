"""Failures in words that say what to do."""

import torch

OutOfMemory: type[Exception] = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError


def memory_error(error: Exception, what: str) -> Exception | None:
    """An OutOfMemoryError that says `what`, where `error` is one in any form; else None."""
    text = str(error)
    if not isinstance(error, OutOfMemory) and not any(
        sign in text
        for sign in ("out of memory", "lower capacity or max_requests", "DefaultCPUAllocator: can't allocate")
    ):
        return None
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return OutOfMemory(
        f"{what}: {first}. Lower max_requests or capacity of vivace.accelerate(), give shorter or fewer texts, or free "
        "memory of other programs"
    )
