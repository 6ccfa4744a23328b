"""How close is close: twice the error of the same arithmetic in low precision, as flash-attn's tests have it."""

import torch


def largest_error(a, b):
    """Largest |a - b|; equal infinities differ by 0, and a NaN on one side alone by infinity."""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    difference = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, difference)
    return float(torch.where(difference.isnan(), torch.inf, difference).max())


def rounding(exact, dtype):
    """What one more addition in ``dtype`` would lose: the floor below which errors are not told apart."""
    if exact.numel() == 0:
        return 0.0
    rounded = exact.to(dtype)
    again = torch.where(torch.isfinite(rounded), rounded + 0.3 - 0.3, rounded)
    return 2.0 * largest_error(again, rounded)


def assert_accurate(actual, exact, low, factor=2.0, atol=0.0, what="out"):
    """|actual - exact| <= factor * max|low - exact| + the dtype's rounding + atol.

    exact: float64; low: the same arithmetic in actual's dtype. float32 gets 2e-6 of the largest value besides: it is
    compared with sums in another order.
    """
    assert actual.shape == exact.shape, f"{what} has shape {list(actual.shape)}, expected {list(exact.shape)}"
    error, allowed = largest_error(actual, exact), largest_error(low, exact)
    finite = exact[torch.isfinite(exact)]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    bound = factor * allowed + rounding(exact, actual.dtype) + atol
    if actual.dtype == torch.float32:
        bound += 2e-6 * max(size, 1.0)
    if error <= bound:
        return
    where = torch.where((actual.double() - exact).isnan(), torch.inf, (actual.double() - exact).abs())
    index = [int(x) for x in torch.unravel_index(where.argmax(), where.shape)]
    raise AssertionError(
        f"{what} is off by {error:.3e} at {index} (got {actual[tuple(index)].item():.6g}, expected "
        f"{exact[tuple(index)].item():.6g}); allowed {bound:.3e}: "
        f"{factor} times the {allowed:.3e} of {actual.dtype} arithmetic"
    )


def assert_rounded(actual, exact, spare=4e-6, scale=None, what="out"):
    """actual is exact, computed in float32 and rounded once; scale bounds the terms of a cancelling sum."""
    assert actual.shape == exact.shape, f"{what} has shape {list(actual.shape)}, expected {list(exact.shape)}"
    size = exact.abs() if scale is None else scale
    bound = torch.finfo(actual.dtype).eps / 2 * exact.abs() + spare * size + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - exact).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(-1.0)
    assert not error.isnan().any(), f"{what} has NaN"
    assert float(worst) <= 0, f"{what} is {float(worst):.3e} beyond float32 arithmetic rounded once to {actual.dtype}"
