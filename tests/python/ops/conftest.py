import pytest
import torch

from .cases import DTYPES, FAMILIES, OPS, Case


@pytest.fixture
def case(request):
    """A Case of the grid, with its kernel family forced for as long as the test runs."""
    fields = dict(request.param)
    family = FAMILIES[fields.pop("family")]
    previous = OPS.force_arch(family) if fields["device"] == "cuda" else None
    yield Case(**{**fields, "dtype": DTYPES[fields["dtype"]]})
    if previous is not None:
        OPS.force_arch(previous)


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in FAMILIES)])
def target(request):
    """A device name, with each kernel family of CUDA forced in turn."""
    if request.param == "cpu":
        yield "cpu"
        return
    previous = OPS.force_arch(FAMILIES[request.param])
    yield "cuda"
    OPS.force_arch(previous)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param
