"""vivace::silu_gate."""

import torch

from reference.activation import silu_gate
from reference.tolerance import assert_rounded

from .cases import OPS, grid


@grid(
    "silu_gate",
    cpu=36,
    cuda=54,
    width=(1, 3, 8, 64, 257, 4096, 11008),
    shape=((1,), (6,), (2, 3), (33,)),
    layout=("contiguous", "strided", "unaligned"),
    scale=(1.0, 10.0),
)
def test_silu_gate_equals_the_reference(case):
    x = case.randn(*case.shape, 2 * case.width, scale=case.scale)
    if case.layout == "strided":
        room = torch.full((*case.shape, 3 * case.width), float("nan"), dtype=case.dtype, device=case.device)
        room[..., case.width :] = x
        x = room[..., case.width :]
    elif case.layout == "unaligned":
        room = torch.full((x.numel() + 1,), float("nan"), dtype=case.dtype, device=case.device)
        room[1:] = x.flatten()
        x = room[1:].view(x.shape)
    out = OPS.silu_gate(x)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert_rounded(out, silu_gate(x), spare=1e-5)


@grid("silu_extremes", cpu=3, cuda=3)
def test_saturated_gates_give_zero_or_the_gate(case):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    x = torch.cat([gate, torch.ones(5)]).to(case.dtype).to(case.device)[None]
    out = OPS.silu_gate(x)[0].double().cpu()
    torch.testing.assert_close(
        out, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]).to(case.dtype).double(), rtol=1e-3, atol=1e-30
    )


@grid("silu_empty", cpu=3, cuda=3)
def test_no_rows_give_no_rows(case):
    assert OPS.silu_gate(case.randn(0, 64)).shape == (0, 32)


@grid("silu_containment", cpu=3, cuda=3)
def test_nan_stays_in_its_element(case):
    x = case.randn(3, 80)
    clean = OPS.silu_gate(x)
    x[1, 5] = float("nan")
    out = OPS.silu_gate(x)
    assert out[1, 5].isnan()
    out[1, 5] = clean[1, 5]
    assert torch.equal(out, clean)
