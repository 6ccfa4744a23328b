"""vivace's own calls: what a cell asks of it, by which kernels, and what a call costs the host."""

import contextlib
import functools
import types
import warnings
from collections.abc import Callable

import torch

import vivace.ops
from vivace.bench.cells import Cell
from vivace.bench.tensors import DTYPES, Inputs
from vivace.bench.timing import DISPATCHES, Call

FORCED = {"auto": 0, "90": 90, "80": 80, "generic": -1}
SDPA = "scaled_dot_product_attention"
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
        lengths, table = inputs.cache_seqlens, inputs.block_table
        k, v = inputs.pages or (k, v)

        def function():
            return ops.attention_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)
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


def family_of(kernel: str) -> str:
    """The family that `vivace.ops.attention_kernel` names: "sm90a", "sm80", "generic", "decode", "cpu"."""
    name = kernel.removeprefix("attention_").removeprefix("forward_")
    return "sm90a" if name == "sm90" else name


def last_family() -> str:
    """The family of the last attention call."""
    return family_of(vivace.ops.attention_kernel())


def nominal_arch(arch: str, device: str) -> str:
    """What is asked for, where no kernel was seen: "sm90a" for "auto" on Hopper; on the CPU "cpu"."""
    if device == "cpu":
        return "cpu"
    if arch != "auto":
        return NAMES[arch]
    major, minor = torch.cuda.get_device_capability()
    return "sm90a" if (major, minor) == (9, 0) else f"sm{major}{minor}"


def overhead_calls(cell: Cell, device: str) -> dict[str, dict[str, Call]]:
    """Calls too small for the device's time to count: language -> name -> call; torch's is named SDPA."""
    dtype = DTYPES[cell.dtype]
    q, k, v = (torch.zeros(1, 1, 1, 64, device=device, dtype=dtype) for _ in range(3))
    cache_k, cache_v = (torch.zeros(1, 8, 1, 64, device=device, dtype=dtype) for _ in range(2))
    lengths = torch.zeros(1, device=device, dtype=torch.int32)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    ops = torch.ops.vivace
    python = {
        "torch.ops.vivace.attention": Call(lambda: ops.attention(q, k, v)),
        "vivace.attention": Call(lambda: vivace.ops.attention(q, k, v)),
        "torch.ops.vivace.attention_with_kvcache": Call(
            lambda: ops.attention_with_kvcache(q, cache_k, cache_v, k, v, lengths)
        ),
        SDPA: Call(lambda: torch.nn.functional.scaled_dot_product_attention(*heads)),
    }
    loops = scripted_loops()
    compiled = {
        "torch.ops.vivace.attention": lambda: loops.attention(q, k, v, DISPATCHES),
        "torch.ops.vivace.attention_with_kvcache": lambda: loops.kvcache(
            q, cache_k, cache_v, k, v, lengths, DISPATCHES
        ),
        SDPA: lambda: loops.sdpa(*heads, DISPATCHES),
    }
    return {
        "Python": python,
        "C++": {name: Call(function, inference, DISPATCHES) for name, function in compiled.items()},
    }


def inference():
    """As the C++ host runs: no autograd."""
    return torch.inference_mode()


@functools.cache
def scripted_loops():
    """Loops that TorchScript's interpreter runs without Python: the cost of a call from C++ through the dispatcher.

    A call's query is the output of the one before it, so that none of them can be left out or merged.
    """

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            q, _lse = torch.ops.vivace.attention(q, k, v)
        return q

    def kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        count: int,
    ) -> torch.Tensor:
        for _ in range(count):
            q, _lse = torch.ops.vivace.attention_with_kvcache(q, k_cache, v_cache, k, v, lengths)
        return q

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            q = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return types.SimpleNamespace(**{f.__name__: torch.jit.script(f) for f in (attention, kvcache, sdpa)})
