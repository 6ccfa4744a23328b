"""What is measured: one cell is one shape of one operator. No torch."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from vivace.bench import lists

TOKENS = 16384  # of a forward cell, in all its sequences
HIDDEN = 2048  # heads * head_dim of a forward cell
DECODE_HIDDEN = 1024  # the same of a decode cell: T3's

#: Fields of a cell that a list on the command line chooses by.
CHOICES = ("op", "d", "s", "s_k", "mask", "window", "lengths", "rows", "kv", "page", "heads", "heads_kv", "batch")


#: What a decode row calls these fields.
DECODE_NAMES = {"heads": "hq", "heads_kv": "hkv", "kv": "s"}


@dataclass(frozen=True)
class Cell:
    """op forward: batch * s queries over s_k keys; varlen: packed sequences; decode: one query for each of rows."""

    op: str
    d: int = 0
    causal: bool = False
    s: int = 0
    s_k: int = 0
    window: int = -1  # keys that a query sees before its own; without causal as many after it; -1: all
    batch: int = 0
    heads: int = 0
    heads_kv: int = 0
    rows: int = 0
    kv: int = 0
    page: int = 0  # keys of a page of decode's cache; 0: a row's keys are in one piece
    lengths: str = ""  # of varlen: COUNTxMIN-MAX
    dtype: str = "bf16"
    bar: float | None = None  # vivace's rate over cuDNN's from which on it is the fastest known

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def window_size(self) -> tuple[int, int]:
        return self.window, 0 if self.causal else self.window

    def title(self) -> str:
        if self.op == "overhead":
            return "overhead"
        shape = {
            "forward": f"{self.mask} {self.batch}x{self.s}" + (f" over {self.s_k}" if self.s_k != self.s else ""),
            "varlen": f"{self.mask} {self.lengths}",
            "decode": f"{self.rows} rows over {self.kv}" + (f" in pages of {self.page}" if self.page else ""),
        }[self.op]
        window = f" window {self.window}" if self.window >= 0 else ""
        return f"{self.op} d{self.d} {self.heads}:{self.heads_kv} heads {shape}{window} {self.dtype}"

    def unused(self) -> tuple[str, ...]:
        """Fields that the operator does not have."""
        return {
            "forward": ("rows", "kv", "page", "lengths"),
            "varlen": ("s", "s_k", "rows", "kv", "page"),
            "decode": ("causal", "s", "s_k", "batch", "lengths", "window"),
            "overhead": tuple(asdict(self).keys() - {"op", "dtype"}),
        }[self.op]

    def key(self) -> dict:
        """The fields that say which cell it is, as its rows have them."""
        unused = self.unused()
        fields = {name: value for name, value in asdict(self).items() if name not in unused and name != "bar"}
        if self.op == "decode":
            return {DECODE_NAMES.get(name, name): value for name, value in fields.items()}
        return fields

    def chosen_by(self, arguments: argparse.Namespace) -> bool:
        """Whether each list that was given has this cell's value, or its operator has no such field.

        The cost of a call has no shape: asking for one leaves it out.
        """
        if self.op == "overhead" and any(getattr(arguments, name, None) is not None for name in CHOICES[1:]):
            return self.op in getattr(arguments, "op", ())
        own = {name: value for name, value in asdict(self).items() if name not in self.unused()} | {"mask": self.mask}
        if self.op not in ("forward", "varlen"):
            del own["mask"]
        return all(
            getattr(arguments, name, None) is None or name not in own or own[name] in getattr(arguments, name)
            for name in CHOICES
        )


def visible_pairs(s: int, s_k: int, causal: bool, window: int = -1) -> float:
    """Pairs of a query and a key that it sees; s * s / 2 for a square causal mask, as is customary."""
    if window < 0 and not causal:
        return float(s) * s_k
    if window < 0 and s == s_k:
        return s * s / 2
    total = 0
    for i in range(s):
        position = i + s_k - s  # bottom-right alignment
        last = position if causal else position + window
        first = 0 if window < 0 else position - window
        total += max(0, min(last, s_k - 1) - max(first, 0) + 1)
    return float(total)


def flop(cell: Cell, lengths: tuple[int, ...] = ()) -> float:
    """Floating point operations of the two matrix products: 4 * d for each visible pair and head."""
    if cell.op == "varlen":
        pairs = sum(visible_pairs(n, n, cell.causal, cell.window) for n in lengths)
    else:
        pairs = cell.batch * visible_pairs(cell.s, cell.s_k, cell.causal, cell.window)
    return 4.0 * cell.d * cell.heads * pairs


def kv_bytes(cell: Cell) -> int:
    """Bytes of keys and values that a decode call reads."""
    return 2 * cell.rows * cell.kv * cell.heads_kv * cell.d * (4 if cell.dtype == "fp32" else 2)


#: Flags that only one operator has: they say which is meant, where --op does not.
TELLING = {"forward": ("s", "s_k", "batch"), "varlen": ("lengths",), "decode": ("rows", "kv", "page")}


def default_ops(arguments: argparse.Namespace) -> list[str]:
    told = [op for op, names in TELLING.items() if any(getattr(arguments, name, None) is not None for name in names)]
    return told or ["forward", "decode", "overhead"]


def grid(arguments: argparse.Namespace, cpu: bool) -> Iterator[Cell]:
    """All combinations of the lists on the command line."""

    def chosen(name, default):
        value = getattr(arguments, name, None)
        return default if value is None else value

    dtypes = chosen("dtype", ["fp32"] if cpu else ["bf16"])
    tokens, hidden, decode_hidden = (256, 128, 128) if cpu else (TOKENS, HIDDEN, DECODE_HIDDEN)
    for op, dtype in itertools.product(chosen("op", default_ops(arguments)), dtypes):
        if op == "overhead":
            yield Cell(op, dtype=dtype)
            continue
        for d in chosen("d", [64] if cpu else [64, 128]):
            for heads in chosen("heads", [max(1, (decode_hidden if op == "decode" else hidden) // d)]):
                for heads_kv in chosen("heads_kv", [heads]):
                    if heads % heads_kv:
                        raise ValueError(f"vivace bench attention: heads_kv {heads_kv} does not divide heads {heads}")
                    common = {"d": d, "heads": heads, "heads_kv": heads_kv, "dtype": dtype}
                    if op == "decode":
                        rows, kv = (
                            chosen("rows", [2] if cpu else [2, 16, 40, 128]),
                            chosen("kv", [64] if cpu else [512, 1024, 4096]),
                        )
                        for page, r, n in itertools.product(chosen("page", [0]), rows, kv):
                            if page and n % page:
                                raise ValueError(f"vivace bench attention: page {page} does not divide kv {n}")
                            yield Cell(op, rows=r, kv=n, page=page, **common)
                        continue
                    masks, windows = chosen("mask", ["full", "causal"]), chosen("window", [-1])
                    for mask, window in itertools.product(masks, windows):
                        common |= {"causal": mask == "causal", "window": window}
                        if op == "varlen":
                            for text in chosen("lengths", ["4x8-32"] if cpu else ["64x60-400"]):
                                yield Cell(op, lengths=text, batch=lists.split_lengths(text)[0], **common)
                            continue
                        lengths = chosen("s", [64, 128] if cpu else [2**n for n in range(9, 15)])
                        for s in lengths:
                            for s_k, batch in itertools.product(
                                chosen("s_k", [s]), chosen("batch", [max(1, tokens // s)])
                            ):
                                yield Cell(op, s=s, s_k=s_k, batch=batch, **common)
