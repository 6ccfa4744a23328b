"""Named sets of cells. No torch."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace

from vivace.bench.cells import HIDDEN, TOKENS, Cell, grid

PAGE = 128  # keys
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

#: The best of cuDNN, flash-attn 3 and flash-attn 4 over cuDNN in the same run, by d, mask and length: measured on one
#: H200 with torch 2.11 and CUDA 13.0, 16,384 tokens, hidden 2048, bf16. vivace holds a cell when its own ratio is at
#: least that.
BARS = {
    (64, "full"): (1.00, 1.00, 1.04, 1.08, 1.13, 1.19),
    (64, "causal"): (1.00, 1.00, 1.04, 1.10, 1.18, 1.11),
    (128, "full"): (1.00, 1.06, 1.05, 1.06, 1.08, 1.10),
    (128, "causal"): (1.00, 1.08, 1.21, 1.15, 1.14, 1.17),
}


def cells(arguments: argparse.Namespace, cpu: bool) -> list[Cell]:
    """The cells that the command line asks for.

    Raises:
        ValueError: there is none.
    """
    every = [cell for preset in arguments.preset for cell in PRESETS[preset]() if cell.chosen_by(arguments)]
    if not arguments.preset:
        unshaped = not any(getattr(arguments, name, None) is not None for name in GRID_FLAGS)
        every = [cell for cell in h200() if cell.chosen_by(arguments)] if unshaped and not cpu else []
        if not every:
            return list(dict.fromkeys(grid(arguments, cpu)))
    if not every:
        raise ValueError("vivace bench attention: no cell of the preset has the values given")
    dtypes = getattr(arguments, "dtype", ["bf16"])
    # The bars were measured in bf16.
    every = [replace(c, dtype=dtype, bar=c.bar if dtype == "bf16" else None) for dtype in dtypes for c in every]
    return list(dict.fromkeys(every))


GRID_FLAGS = ("d", "s", "s_k", "mask", "window", "lengths", "rows", "kv", "page", "heads", "heads_kv", "batch")


def square(d: int, mask: str, s: int, **fields) -> Cell:
    """A forward cell of TOKENS tokens and about HIDDEN wide, where the fields do not say otherwise."""
    fields = {"s_k": s, "batch": max(1, TOKENS // s), "heads": HIDDEN // d} | fields
    fields = {"heads_kv": fields["heads"]} | fields
    return Cell("forward", d=d, causal=mask == "causal", s=s, **fields)


def h200() -> Iterator[Cell]:
    for (d, mask), bars in BARS.items():
        for s, bar in zip(LENGTHS, bars, strict=True):
            yield square(d, mask, s, bar=bar)
    for page, (d, heads, heads_kv) in itertools.product((0, PAGE), ((64, 16, 16), (128, 32, 8))):
        for rows in (2, 16, 40, 128):
            for kv in (512, 1024, 4096):
                yield Cell("decode", d=d, heads=heads, heads_kv=heads_kv, rows=rows, kv=kv, page=page)
    yield Cell("overhead")


def extra() -> Iterator[Cell]:
    for mask in ("full", "causal"):
        for s in (1024, 4096):
            for d in (96, 192, 256):
                yield square(d, mask, s)
            yield square(128, mask, s, heads=32, heads_kv=8)
    # T3's batched prefill, and a Llama's.
    yield Cell("varlen", d=64, causal=True, batch=64, heads=16, heads_kv=16, lengths="64x60-400")
    yield Cell("varlen", d=128, causal=True, batch=16, heads=32, heads_kv=8, lengths="16x500-4000")
    for d in (64, 128):
        for mask in ("full", "causal"):
            yield square(d, mask, 512, s_k=4096)
            yield square(d, mask, 2048, s_k=4096)
        for s in (4096, 8192):
            yield square(d, "causal", s, window=512)
    for s in (500, 1000, 1500, 2000, 2500):  # S3Gen's blocks
        yield square(64, "full", s, batch=2, heads=8)


PRESETS = {"h200": h200, "extra": extra}
