"""What the operator tests share: grids of cases, tensors in every memory layout, and the kernel family to run on."""

import random
from types import SimpleNamespace

import pytest
import torch

import vivace.ops  # noqa: F401  loads torch.ops.vivace

OPS = torch.ops.vivace
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = {"auto": 0, "sm80": 80, "generic": -1}
HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
HEADS = ((1, 1), (4, 4), (6, 2), (8, 1), (9, 3))  # heads, heads_kv
LENGTHS = ((1, 1), (1, 147), (5, 3), (113, 203), (128, 217), (108, 256), (64, 64), (127, 130), (200, 97))
LONG_LENGTHS = ((256, 512), (512, 256), (1023, 1024), (1024, 1023), (3, 799), (64, 2048), (1, 339))
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_left": 17},
    "right": {"window_right": 5},
    "both": {"window_left": 30, "window_right": 11},
    "diagonal": {"window_left": 0, "window_right": 0},
    "causal_left": {"causal": True, "window_left": 40},
}
LAYOUTS = ("contiguous", "permuted", "packed", "unaligned", "sliced_heads")


def sample(count, name, **axes):
    """``count`` combinations of the axes' values, each value at least once (if count allows), the same in every run."""
    rng = random.Random(name)
    columns = {}
    for axis, values in axes.items():
        values = list(values)
        column = []
        while len(column) < count:
            rng.shuffle(values)
            column += values
        columns[axis] = column[:count]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def describe(value):
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return str(value)


def grid(name, cpu, cuda, cuda_axes=None, dtypes=tuple(DTYPES), **axes):
    """Parametrizes ``case`` with ``cpu`` cases on the CPU and ``cuda`` on CUDA, spread over dtypes and kernel families.

    cuda_axes replaces axes on CUDA (longer sequences). There fp32 has no tensor-core family.
    """
    params = []
    for fields in sample(cpu, name, dtype=dtypes, **axes):
        params.append(({"device": "cpu", "family": "auto", **fields}, ()))
    for fields in sample(cuda, name + "/cuda", family=FAMILIES, dtype=dtypes, **{**axes, **(cuda_axes or {})}):
        if fields["dtype"] == "fp32" and fields["family"] == "sm80":
            fields["family"] = "auto"
        params.append(({"device": "cuda", **fields}, (pytest.mark.gpu,)))
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                fields, id=f"{n}-" + "-".join(describe(v) for v in fields.values() if v is not None), marks=marks
            )
            for n, (fields, marks) in enumerate(params)
        ],
        indirect=True,
    )


class Case(SimpleNamespace):
    """One point of a grid; dtype is a torch dtype."""

    def randn(self, *shape, dtype=None, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype or self.dtype).to(self.device)

    def int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def arrange(x, layout):
    """x with the same values in another memory layout; the last dimension stays contiguous."""
    if layout == "permuted":  # (batch, heads, seqlen, d) in memory; (heads, total, d) for three dimensions
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "packed":  # the middle one of three beside each other, as in a fused projection
        room = x.new_full((*x.shape[:-2], 3, *x.shape[-2:]), float("nan"))
        room[..., 1, :, :] = x
        return room[..., 1, :, :]
    if layout == "unaligned":  # storage offset and row stride of odd element counts: no row is 16-byte aligned
        width = x.shape[-1] + 1 + x.shape[-1] % 2
        flat = x.new_full((x.numel() // max(x.shape[-1], 1) * width + 1,), float("nan"))
        room = flat[1:].view(*x.shape[:-1], width)
        room[..., : x.shape[-1]] = x
        return room[..., : x.shape[-1]]
    if layout == "sliced_heads":  # a slice of more heads
        room = x.new_full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1]), float("nan"))
        room[..., 1:-1, :] = x
        return room[..., 1:-1, :]
    return x.contiguous()


def make_bias(case, kind, batch, heads, seqlen_q, seqlen_k):
    """A bias of one of the accepted dtypes and broadcast forms."""
    if kind is None:
        return None
    dtype, form = kind
    shape = {
        "full": (batch, heads, seqlen_q, seqlen_k),
        "keys": (batch, 1, 1, seqlen_k),
        "heads": (1, heads, seqlen_q, seqlen_k),
        "one": (1, 1, seqlen_q, seqlen_k),
    }[form]
    if dtype == "bool":
        return (torch.rand(*shape) < 0.7).to(case.device)
    return case.randn(*shape, dtype=torch.float32 if dtype == "fp32" else case.dtype)


def make_slopes(case, kind, batch, heads):
    if kind is None:
        return None
    shape = (heads,) if kind == "heads" else (batch, heads)
    return (torch.rand(*shape) * 0.3).to(case.device)


def cumulative(lengths, device="cpu"):
    """cu_seqlens of these lengths."""
    return torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32, device=device
    )


def lse_slack(case_softcap):
    """Absolute error allowed in lse, whose arithmetic is float32: hardware tanh (2^-11 relative) with softcap."""
    return 1e-4 if not case_softcap else 4e-3


def assert_lse(actual, exact, slack):
    """lse is float32 and as accurate as float32 arithmetic on the given inputs."""
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape, f"lse has shape {list(actual.shape)}, expected {list(exact.shape)}"
    torch.testing.assert_close(actual.double(), exact.double(), rtol=1e-5, atol=slack)
