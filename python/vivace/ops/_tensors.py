"""What the functions do with tensors before and after an operator."""

import torch


def last_contiguous(t):
    return t if t is None or t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def check_tensors(name, **tensors):
    """Raises TypeError where an argument is no tensor."""
    for argument, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"vivace.{name}: {argument} is of type {type(t).__name__}, expected a tensor")


def window_pair(name, window_size):
    """(left, right) of a window_size."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(
            f"vivace.{name}: window_size is {window_size!r}, expected a pair: keys before and after, -1 for all"
        ) from None
    return left, right


def rows_even(t):
    """t, or a copy where its rows are not one stride apart."""
    if t.dim() == 0 or t.is_contiguous():
        return t
    if t.stride(-1) != 1:
        return t.contiguous()
    for d in range(t.dim() - 3, -1, -1):
        if t.shape[d] != 1 and t.stride(d) != t.stride(d + 1) * t.shape[d + 1]:
            return t.contiguous()
    return t


def draw_rng_state(q):
    return torch.randint(0, 2**31, (2,), dtype=torch.int64, device=q.device)


def no_gradient(name, *tensors):
    if not torch.is_grad_enabled():
        return
    for t in tensors:
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"vivace.{name}: it has no gradient, but an argument requires one; call it under torch.no_grad()"
            )


def mutated(*tensors):
    # The operator writes behind autograd's back: a saved tensor that was overwritten shall be noticed.
    if torch.compiler.is_compiling():
        return
    if torch.is_inference_mode_enabled():
        tensors = tuple(t for t in tensors if not t.is_inference())
    torch.autograd.graph.increment_version(tensors)
