"""vivace::rms_norm and vivace::add_rms_norm."""

import torch

from reference.norm import add_rms_norm, rms_norm
from reference.tolerance import assert_rounded

from .cases import OPS, grid

WIDTHS = (1, 2, 7, 64, 255, 1024, 1025, 4096, 16384)
SHAPES = ((1,), (5,), (33,), (2, 3), (4, 1, 7))


def rows(case, shape, width, layout):
    """(*shape, width) with contiguous, strided or unaligned rows."""
    x = case.randn(*shape, width)
    if layout == "strided":
        room = torch.full((*shape, 2 * width), float("nan"), dtype=case.dtype, device=case.device)
        room[..., width:] = x
        return room[..., width:]
    if layout == "unaligned":
        room = torch.full((x.numel() + 1,), float("nan"), dtype=case.dtype, device=case.device)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)
    return x


@grid(
    "rms_norm",
    cpu=40,
    cuda=60,
    width=WIDTHS,
    shape=SHAPES,
    eps=(1e-5, 1e-6, 0.1),
    layout=("contiguous", "strided", "unaligned"),
)
def test_rms_norm_equals_the_reference(case):
    x = rows(case, case.shape, case.width, case.layout)
    weight = case.randn(case.width)
    out = OPS.rms_norm(x, weight, case.eps)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert_rounded(out, rms_norm(x, weight, case.eps))


@grid("add_rms_norm", cpu=40, cuda=60, width=WIDTHS, shape=SHAPES, layout=("contiguous", "strided", "unaligned"))
def test_add_rms_norm_adds_into_the_residual_and_normalises_the_sum(case):
    x = rows(case, case.shape, case.width, case.layout)
    residual = rows(case, case.shape, case.width, case.layout)
    weight = case.randn(case.width)
    before = x.clone()
    exact, total = add_rms_norm(x, residual, weight, 1e-5)
    out = OPS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total), "residual must be x + residual, rounded once"
    assert torch.equal(x, before)
    # The norm is of the sum as written back.
    assert_rounded(out, exact)


@grid("rms_norm_empty", cpu=3, cuda=3)
def test_no_rows_give_no_rows(case):
    assert OPS.rms_norm(case.randn(0, 64), case.randn(64)).shape == (0, 64)


@grid("rms_norm_extremes", cpu=3, cuda=3)
def test_large_and_tiny_rows_neither_overflow_nor_vanish(case):
    x = case.randn(3, 256)
    x[0] *= 200.0 if case.dtype == torch.float16 else 1e15
    x[1] *= 1e-3
    x[2] = 0.0
    weight = case.randn(256)
    out = OPS.rms_norm(x, weight)
    assert torch.isfinite(out).all() and (out[2] == 0).all()
    assert_rounded(out, rms_norm(x, weight))


@grid("rms_norm_containment", cpu=3, cuda=3)
def test_nan_stays_in_its_row(case):
    x, weight = case.randn(5, 300), case.randn(300)
    clean = OPS.rms_norm(x, weight)
    x[2, 7] = float("nan")
    out = OPS.rms_norm(x, weight)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@grid("rms_norm_alone", cpu=3, cuda=6, width=(1024, 100))
def test_a_row_alone_gives_the_bits_it_has_among_others(case):
    x, weight = case.randn(9, case.width), case.randn(case.width)
    out = OPS.rms_norm(x, weight)
    assert all(torch.equal(OPS.rms_norm(x[i : i + 1], weight)[0], out[i]) for i in range(9))
