"""The libraries that vivace is measured beside: torch's SDPA backends, flash-attn 2, 3 and 4, where installed."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from vivace.bench.cells import Cell
from vivace.bench.tensors import Inputs
from vivace.bench.timing import Call

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PACKAGES = {"flash_attn": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


class Unsupported(ValueError):
    """The peer has no way to do the cell."""


@dataclass(frozen=True)
class Way:
    """One way to ask a peer for a cell: a tensor layout. ``unpack`` brings its result into vivace's layout."""

    call: Call
    unpack: Callable[[torch.Tensor], torch.Tensor]


#: Name of a layout -> the way.
Peer = Callable[[Cell, Inputs], dict[str, Way]]


def installed(device: str, chosen: list[str] | None) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers of this machine, and why the chosen others are not among them."""
    peers, missing = {}, {}
    if device == "cpu":
        everything = {"sdpa": lambda cell, inputs: torch_ways(None, cell, inputs)}
    else:
        everything = {name: torch_peer(backend) for name, backend in BACKENDS.items()}
    for name in (*BACKENDS, "sdpa", *PACKAGES):
        if chosen is not None and name not in chosen:
            continue
        if name in everything:
            peers[name] = everything[name]
        elif name in PACKAGES and device == "cuda":
            try:
                peers[name] = package_peer(name, importlib.import_module(PACKAGES[name]))
            except Exception as error:  # a package built for another torch fails in its own ways
                if chosen is not None:
                    missing[name] = f"{type(error).__name__}: {error}"
        elif chosen is not None:
            missing[name] = f"not for {device}"
    return peers, missing


def torch_peer(backend: SDPBackend) -> Peer:
    return lambda cell, inputs: torch_ways(backend, cell, inputs)


def torch_ways(backend: SDPBackend | None, cell: Cell, inputs: Inputs) -> dict[str, Way]:
    """scaled_dot_product_attention with one backend, None: torch's choice, in each layout that a user may have."""

    def context():
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if backend is None else backend)

    if cell.op == "varlen":
        return torch_varlen_ways(backend, context, cell, inputs)
    options = {"enable_gqa": True} if cell.heads != cell.heads_kv else {}
    if cell.op == "forward":
        options |= mask_options(backend, cell, inputs)

    def way(q, k, v):
        return Way(
            Call(lambda: scaled_dot_product_attention(q, k, v, **options), context), lambda out: out.transpose(1, 2)
        )

    strided = [t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]
    return {"bshd": way(*strided), "bhsd": way(*(t.contiguous() for t in strided))}


def mask_options(backend: SDPBackend | None, cell: Cell, inputs: Inputs) -> dict:
    """The mask as torch takes it: its is_causal is aligned to the top left, and it has no window."""
    if cell.window < 0 and not cell.causal:
        return {}
    if cell.window < 0 and cell.s == cell.s_k:
        return {"is_causal": True}
    if cell.window < 0 and backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        return {"attn_mask": causal_lower_right(cell.s, cell.s_k)}
    if backend == SDPBackend.FLASH_ATTENTION:
        raise Unsupported("torch's flash backend takes no window")
    position = torch.arange(cell.s, device=inputs.q.device).unsqueeze(1) + (cell.s_k - cell.s)
    ahead = torch.arange(cell.s_k, device=inputs.q.device) - position  # (s, s_k)
    left, right = cell.window_size
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    return {"attn_mask": torch.zeros(1, dtype=inputs.q.dtype, device=hidden.device).masked_fill(hidden, float("-inf"))}


def torch_varlen_ways(backend, context, cell: Cell, inputs: Inputs) -> dict[str, Way]:
    if cell.window >= 0:
        raise Unsupported("torch's packed sequences take no window")
    ways = {}
    gqa = {"enable_gqa": True} if cell.heads != cell.heads_kv else {}
    longest = max(inputs.lengths)
    if backend == SDPBackend.FLASH_ATTENTION:
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.10 says is_causal, later ones a window.
        windowed = "window_size" in inspect.signature(varlen_attn).parameters
        causal = ({"window_size": (-1, 0)} if windowed else {"is_causal": True}) if cell.causal else {}
        ends = inputs.cu_seqlens
        ways["packed"] = Way(
            Call(lambda: varlen_attn(inputs.q, inputs.k, inputs.v, ends, ends, longest, longest, **causal)),
            lambda out: out,
        )
    if backend is not None:
        nested = [
            torch.nested.nested_tensor_from_jagged(
                t, inputs.cu_seqlens.long(), min_seqlen=min(inputs.lengths), max_seqlen=longest
            ).transpose(1, 2)
            for t in (inputs.q, inputs.k, inputs.v)
        ]
        ways["nested"] = Way(
            Call(lambda: scaled_dot_product_attention(*nested, is_causal=cell.causal, **gqa), context),
            lambda out: out.transpose(1, 2).values(),
        )
    if cell.causal:  # padding at the right is behind every query then
        used = torch.zeros(len(inputs.lengths), longest, dtype=torch.bool)
        for row, length in enumerate(inputs.lengths):
            used[row, :length] = True
        used = used.to(inputs.q.device)

        def pad(t):
            padded = t.new_zeros(*used.shape, *t.shape[1:])
            padded[used] = t
            return padded.transpose(1, 2)

        q, k, v = map(pad, (inputs.q, inputs.k, inputs.v))
        ways["padded"] = Way(
            Call(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, **gqa), context),
            lambda out: out.transpose(1, 2)[used],
        )
    if not ways:
        raise Unsupported("no packed sequences without a causal mask")
    return ways


def package_peer(name: str, module) -> Peer:
    """flash-attn 2, 3 or 4: the same functions, of other modules and with other words for "no window"."""
    names = ["flash_attn_func", "flash_attn_varlen_func"] + ([] if name == "fa4" else ["flash_attn_with_kvcache"])
    functions = {function: getattr(module, function) for function in names}
    everything = None if name == "fa4" else -1

    def ways(cell: Cell, inputs: Inputs) -> dict[str, Way]:
        q, k, v = inputs.q, inputs.k, inputs.v
        if cell.op == "decode":
            if "flash_attn_with_kvcache" in functions:
                function = functions["flash_attn_with_kvcache"]
                lengths = inputs.cache_seqlens
                return {"bshd": Way(Call(lambda: function(q, k, v, cache_seqlens=lengths)), first)}
            function = functions["flash_attn_func"]
            return {"bshd": Way(Call(lambda: function(q, k, v)), first)}
        options = {"causal": cell.causal}
        if cell.window >= 0:
            options["window_size"] = tuple(everything if side < 0 else side for side in cell.window_size)
        if cell.op == "forward":
            function = functions["flash_attn_func"]
            return {"bshd": Way(Call(lambda: function(q, k, v, **options)), first)}
        function = functions["flash_attn_varlen_func"]
        options |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens}
        known = inspect.signature(function).parameters
        options |= {key: max(inputs.lengths) for key in ("max_seqlen_q", "max_seqlen_k") if key in known}
        return {"packed": Way(Call(lambda: function(q, k, v, **options)), first)}

    return ways


def first(result):
    return result[0] if isinstance(result, tuple | list) else result
