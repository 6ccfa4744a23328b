"""vivace::rotary_embedding and its in-place form."""

import pytest
import torch

from reference.rotary import rotary_embedding
from reference.tolerance import assert_rounded

from .cases import LAYOUTS, OPS, Case, arrange, grid


def tables(case, positions, half, dtype=None):
    angle = torch.rand(positions, half) * 6.28
    dtype = dtype or torch.float32
    return angle.cos().to(dtype).to(case.device), angle.sin().to(dtype).to(case.device)


def compare(out, x, cos, sin, positions, interleaved):
    exact = rotary_embedding(x.flatten(0, -3), cos, sin, positions.flatten(), interleaved).view(x.shape)
    size = rotary_embedding(x.flatten(0, -3).abs(), cos.abs(), -sin.abs(), positions.flatten(), interleaved).view(
        x.shape
    )
    assert_rounded(out, exact, scale=size.abs() + x.double().abs())


@grid(
    "rotary",
    cpu=50,
    cuda=70,
    shape=((7,), (1,), (2, 9), (3, 1)),
    heads=(1, 2, 5, 16),
    head_dim=(32, 40, 64, 96, 128, 111, 256),
    part=(1.0, 0.5, 0.25),
    positions=(None, torch.int32, torch.int64),
    interleaved=(False, True),
    table=("fp32", "dtype"),
    layout=LAYOUTS,
)
def test_rotary_equals_the_reference(case):
    half = max(1, int(case.head_dim * case.part) // 2)
    x = arrange(case.randn(*case.shape, case.heads, case.head_dim), case.layout)
    cos, sin = tables(case, 50, half, None if case.table == "fp32" else case.dtype)
    positions = torch.arange(case.shape[-1]).expand(case.shape).to(case.device)
    given = None
    if case.positions is not None:
        positions = torch.randint(50, case.shape).to(case.device)
        given = positions.to(case.positions)
    before = x.clone()
    out = OPS.rotary_embedding(x, cos, sin, given, case.interleaved)
    assert out.dtype == x.dtype and torch.equal(x, before)
    compare(out, before, cos, sin, positions, case.interleaved)
    assert OPS.rotary_embedding_(x, cos, sin, given, case.interleaved) is None
    assert torch.equal(x, out), "in place must give the same bits"


@grid("rotary_empty", cpu=3, cuda=3)
def test_no_tokens_give_no_tokens(case):
    cos, sin = tables(case, 4, 32)
    assert OPS.rotary_embedding(case.randn(0, 2, 64), cos, sin).shape == (0, 2, 64)


@grid("rotary_norm", cpu=2, cuda=2, dtypes=("fp32",), interleaved=(False, True))
def test_rotation_keeps_lengths_and_depends_on_the_distance_alone(case):
    frequency = 1.0 / 10000 ** (torch.arange(16) / 16)
    angle = torch.arange(60)[:, None] * frequency
    cos, sin = angle.cos().to(case.device), angle.sin().to(case.device)
    q, k = case.randn(1, 1, 32), case.randn(1, 1, 32)

    def turned(x, position):
        return OPS.rotary_embedding(x, cos, sin, case.int32([position]), case.interleaved)[0, 0].double()

    assert abs(float(turned(q, 33).norm() - q.double().norm())) < 1e-4
    assert abs(float(turned(q, 20) @ turned(k, 11) - turned(q, 50) @ turned(k, 41))) < 1e-3


@pytest.mark.gpu
def test_a_position_out_of_range_touches_no_memory_outside_on_cuda():
    case = Case(device="cuda", dtype=torch.float32)
    cos, sin = tables(case, 8, 16)
    x = case.randn(3, 2, 32)
    out = OPS.rotary_embedding(x, cos, sin, case.int32([1, 1 << 30, 2]))
    torch.cuda.synchronize()
    compare(out[[0, 2]], x[[0, 2]], cos, sin, torch.tensor([1, 2], device="cuda"), False)
