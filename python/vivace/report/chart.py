"""What the figures of the report are made of: names and styles of lines, plots in a grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vivace.bench.tables import Table, peers_of
from vivace.report.svg import Axis, Plot, Series, beside, legend

WIDE, NARROW = 936, 320  # pixels of a figure on a desk and on a phone
HEIGHT = 330  # of a plot
GAP = 28

NAMES = {
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2 (torch)",
    "efficient": "memory-efficient (torch)",
    "sdpa": "torch SDPA",
    "flash_attn": "flash-attn 2",
    "fa3": "flash-attn 3",
    "fa4": "flash-attn 4",
    "compile": "torch.compile + CUDA graphs",
    "eager": "transformers, eager",
}
STYLES = {
    "cudnn": "blue",
    "fa2": "teal",
    "efficient": "grey",
    "sdpa": "blue",
    "flash_attn": "teal",
    "fa3": "violet",
    "fa4": "own2",
    "compile": "blue",
    "eager": "grey",
}


@dataclass
class Figure:
    """``draw`` gives its SVG, for a narrow screen if asked (None: tables only); ``text`` says what to see in it."""

    name: str
    title: str
    text: str
    draw: Callable[[bool], str] | None
    tables: list[Table]


#: Draws a plot of a width, with at least so many pixels above its axes.
Draw = Callable[[int, float], Plot]


def grid(narrow: bool, plots: Sequence[Draw], lines: Sequence[Series] = (), columns: int = 2) -> str:
    """Plots side by side on a desk, one below the other on a phone; a legend of ``lines`` above them all."""
    above = legend(lines, NARROW if narrow else WIDE) if lines else ""
    columns = 1 if narrow else min(columns, len(plots))
    width = NARROW if narrow else (WIDE - GAP * (columns - 1)) // columns
    head = 0 if narrow else max(plot(width, 0).top for plot in plots)
    return beside([plot(width, head).svg() for plot in plots], columns, GAP, above)


def own_rows(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Name of a line -> vivace's rows of it: by family of kernels where there are several."""
    archs = list(dict.fromkeys(row.get("arch", "") for row in rows))
    archs.sort(key=lambda arch: arch == "sm80")  # a fallback, shown beside the kernels of the machine's own
    named = {arch: "vivace" if i == 0 else f"vivace, {arch} kernels" for i, arch in enumerate(archs)}
    return {named[arch]: [row for row in rows if row.get("arch", "") == arch] for arch in archs}


def peer_series(rows: Sequence[dict], x: str, rate: str) -> list[Series]:
    found = []
    for peer in peers_of(rows):
        points = sorted({(row[x], row[f"{rate}_{peer}"]) for row in rows if f"{rate}_{peer}" in row})
        if points:
            found.append(Series(NAMES.get(peer, peer), points, STYLES.get(peer, "grey")))
    return found


def own_series(rows: Sequence[dict], x: str, rate: str, text: Callable[[float], str] | None = None) -> list[Series]:
    found = []
    for i, (name, mine) in enumerate(own_rows(rows).items()):
        points = sorted((row[x], row[rate]) for row in mine)
        labels = [text(y) for _, y in points] if text and i == 0 else []
        found.append(Series(name, points, "own" if i == 0 else "own2", labels))
    return found


def values(series: Sequence[Series]) -> list[float]:
    return [y for one in series for _, y in one.points]


def ticks_of(rows: Sequence[dict], name: str) -> list[float]:
    return sorted({row[name] for row in rows})


def draw(width: int, x: Axis, y: Axis, title: str, lines: Sequence[Series], legend=(), head: float = 0) -> Plot:
    """A plot with its lines; areas come first, so that they lie behind."""
    plot = Plot(width, HEIGHT, x, y, title, legend, head)
    for one in lines:
        plot.add(one)
    return plot


def wide(narrow: bool, items):
    return (NARROW if narrow else WIDE), items, "", not narrow
