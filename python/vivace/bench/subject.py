"""vivace's own calls: what a cell asks of it, by which kernels, and what a call costs the host."""

import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import vivace.ops
from vivace.bench.cells import Cell
from vivace.bench.tensors import DTYPES, Inputs
from vivace.bench.timing import Call

FORCED = {"auto": 0, "90": 90, "80": 80, "generic": -1}
NAMES = {"90": "sm90a", "80": "sm80", "generic": "generic"}


@contextlib.contextmanager
def forced(arch: str):
    """vivace's kernels of ``arch``, for as long as the context lasts."""
    previous = vivace.ops.force_arch(FORCED[arch])
    try:
        yield
    finally:
        vivace.ops.force_arch(previous)


def own_call(cell: Cell, inputs: Inputs, arch: str) -> Call:
    """The operator's call; its result is (out, lse)."""
    ops, left, right = torch.ops.vivace, *cell.window_size
    q, k, v = inputs.q, inputs.k, inputs.v
    function: Callable
    if cell.op == "decode":
        lengths = inputs.cache_seqlens

        def function():
            return ops.attention_with_kvcache(q, k, v, cache_seqlens=lengths)
    elif cell.op == "varlen":
        ends, longest = inputs.cu_seqlens, max(inputs.lengths)

        def function():
            return ops.attention_varlen(
                q, k, v, ends, ends, longest, longest, causal=cell.causal, window_left=left, window_right=right
            )
    else:

        def function():
            return ops.attention(q, k, v, causal=cell.causal, window_left=left, window_right=right)

    return Call(function, lambda: forced(arch))


def family_of(kernels: list[str]) -> str | None:
    """The family of the forward kernel among mangled names: "sm90a", "sm80", "generic"."""
    found = re.findall(r"6vivace(?:4sm(90|80)|7(generic))", " ".join(kernels))
    return NAMES["".join(found[0])] if found else None


def nominal_arch(arch: str, device: str) -> str:
    """What is asked for, where no kernel was seen: "sm90a" for "auto" on Hopper; on the CPU "cpu"."""
    if device == "cpu":
        return "cpu"
    if arch != "auto":
        return NAMES[arch]
    major, minor = torch.cuda.get_device_capability()
    return "sm90a" if (major, minor) == (9, 0) else f"sm{major}{minor}"


def kernel_names(call: Call) -> list[str]:
    """Mangled names of the kernels that a call launches, from CUDA's picture of a graph of it; [] where that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture leaves its own as the current one
            call.context(),
        ):
            warnings.simplefilter("ignore")
            path = Path(folder) / "graph.dot"
            graph.enable_debug_mode()
            with torch.cuda.graph(graph):
                call.function()
            graph.debug_dump(str(path))
            return re.findall(r"_Z\w+", path.read_text(encoding="utf-8", errors="replace"))
    except (RuntimeError, OSError):
        torch.cuda.synchronize()
        return []


def overhead_calls(cell: Cell, device: str) -> tuple[dict[str, Call], str]:
    """Calls too small for the device's time to count: vivace's, by name, and the name of torch's among them."""
    dtype = DTYPES[cell.dtype]
    q, k, v = (torch.zeros(1, 1, 1, 64, device=device, dtype=dtype) for _ in range(3))
    cache_k, cache_v = (torch.zeros(1, 8, 1, 64, device=device, dtype=dtype) for _ in range(2))
    lengths = torch.zeros(1, device=device, dtype=torch.int32)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    ops = torch.ops.vivace
    sdpa = "scaled_dot_product_attention"
    return {
        "torch.ops.vivace.attention": Call(lambda: ops.attention(q, k, v)),
        "vivace.attention": Call(lambda: vivace.ops.attention(q, k, v)),
        "torch.ops.vivace.attention_with_kvcache": Call(
            lambda: ops.attention_with_kvcache(q, cache_k, cache_v, k, v, lengths)
        ),
        sdpa: Call(lambda: torch.nn.functional.scaled_dot_product_attention(*heads)),
    }, sdpa
