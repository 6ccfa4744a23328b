"""Reading memory and nothing else, as a Triton kernel: how fast this GPU can read."""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # floats that a program reads at once: 16 KB
TURNS = 16  # blocks of a program, so that the sums weigh nothing


@triton.jit
def _read(words, out, count, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK * TURNS + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(TURNS):
        total += tl.load(words + offsets, mask=offsets < count, other=0.0)
        offsets += BLOCK
    tl.store(out + program, tl.sum(total))


def reader(words: torch.Tensor):
    """A function of no arguments that reads all of ``words``, float32 on a GPU; its sums are returned."""
    programs = triton.cdiv(words.numel(), BLOCK * TURNS)
    out = torch.empty(programs, device=words.device)

    def read():
        _read[(programs,)](words, out, words.numel(), BLOCK=BLOCK, TURNS=TURNS, num_warps=8)
        return out

    total = float(read().double().sum())
    expected = float(words.double().sum()) if words.numel() < 2**20 else float(words.sum(dtype=torch.float64))
    if abs(total - expected) > 1e-3 * abs(expected) + 1e-3:
        raise RuntimeError("the Triton read did not read everything")
    return read
