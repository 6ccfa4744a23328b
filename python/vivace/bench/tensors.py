"""The inputs of a cell, from a seed, and what its output is told by."""

import ctypes
import hashlib
from dataclasses import dataclass

import torch

from vivace.bench import lists
from vivace.bench.cells import Cell

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Of two outputs of one cell, whose elements are below 8: a few times the rounding of such a value. A coarse net for
#: kernels that compute something else; accuracy is the tests' business.
LARGEST_DIFFERENCE = {"bf16": 0.1, "fp16": 0.02, "fp32": 0.01}


@dataclass
class Inputs:
    """q, k, v of one cell; forward and decode (batch, seqlen, heads, d), varlen (tokens, heads, d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: tuple[int, ...] = ()  # of varlen
    cu_seqlens: torch.Tensor | None = None  # int32 (batch + 1,), of varlen
    cache_seqlens: torch.Tensor | None = None  # int32 (rows,), of decode
    pages: tuple[torch.Tensor, torch.Tensor] | None = None  # k and v as (pages, page, heads_kv, d), of decode in pages
    block_table: torch.Tensor | None = None  # int32 (rows, kv / page), of the same


def make_inputs(cell: Cell, device: str, seed: int) -> Inputs:
    """Normally distributed; the same for the same cell, device type and seed, whatever was measured before."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=DTYPES[cell.dtype])

    if cell.op == "varlen":
        count, shortest, longest = lists.split_lengths(cell.lengths)
        drawn = torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(seed))
        drawn[0] = longest
        total = int(drawn.sum())
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), drawn.cumsum(0)])
        return Inputs(
            normal(total, cell.heads, cell.d),
            normal(total, cell.heads_kv, cell.d),
            normal(total, cell.heads_kv, cell.d),
            lengths=tuple(drawn.tolist()),
            cu_seqlens=ends.to(device, torch.int32),
        )
    if cell.op == "decode":
        made = Inputs(
            normal(cell.rows, 1, cell.heads, cell.d),
            normal(cell.rows, cell.kv, cell.heads_kv, cell.d),
            normal(cell.rows, cell.kv, cell.heads_kv, cell.d),
            cache_seqlens=torch.full((cell.rows,), cell.kv, dtype=torch.int32, device=device),
        )
        return in_pages(made, cell, generator) if cell.page else made
    return Inputs(
        normal(cell.batch, cell.s, cell.heads, cell.d),
        normal(cell.batch, cell.s_k, cell.heads_kv, cell.d),
        normal(cell.batch, cell.s_k, cell.heads_kv, cell.d),
    )


def in_pages(inputs: Inputs, cell: Cell, generator: torch.Generator) -> Inputs:
    """The same keys and values also in pages, which lie in a random order, as after many requests."""
    order = torch.randperm(cell.rows * (cell.kv // cell.page), generator=generator, device=inputs.k.device)

    def scattered(t):
        pages = torch.empty(len(order), cell.page, *t.shape[2:], device=t.device, dtype=t.dtype)
        pages[order] = t.view_as(pages)
        return pages

    inputs.pages = scattered(inputs.k), scattered(inputs.v)
    inputs.block_table = order.to(torch.int32).view(cell.rows, -1)
    return inputs


def hash_of(tensor: torch.Tensor) -> str:
    """SHA-256 of the elements' bytes in row-major order, its first 12 digits."""
    tensor = tensor.detach().contiguous().cpu()
    size = tensor.numel() * tensor.element_size()
    content = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    return hashlib.sha256(content).hexdigest()[:12]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape; NaN where one of them has one."""
    if a.shape != b.shape:
        raise ValueError(f"outputs differ in shape: {list(a.shape)} and {list(b.shape)}")
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0


def text_hash(value) -> str:
    """SHA-256 of what ``repr`` makes of lists of integers, its first 12 digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
