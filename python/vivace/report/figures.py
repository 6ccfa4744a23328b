"""Which figures a set of rows gives, and what is drawn in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vivace.bench.tables import Table, peers_of, tables
from vivace.report.svg import Axis, Plot, Series, axis_from_zero, bars, beside, legend, log_axis

WIDE, NARROW = 936, 320  # pixels of a figure on a desk and on a phone
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


def figures(rows: Sequence[dict]) -> list[Figure]:
    """Those that the rows have something for, in the order of the page."""
    whole = [row for row in rows if "error" not in row]

    def some(op):
        """The rows of an operator; of a generation that several files have, the first."""
        mine = [row for row in whole if row["op"] == op]
        if op != "generate":
            return mine
        names = ("implementation", "model", "requests", "cfg_weight", "dtype")
        return list({tuple(row.get(name) for name in names): row for row in reversed(mine)}.values())[::-1]

    found = [
        make(some(op), tables([row for row in rows if row["op"] in ops]))
        for op, make, ops in (
            ("generate", speed, ("generate",)),
            ("generate", real_time, ()),
            ("step", step, ("step",)),
            ("forward", forward, ("forward", "varlen")),
            ("decode", decode, ("decode",)),
            ("overhead", overhead, ("overhead",)),
        )
        if some(op)
    ]
    shown = [figure for figure in found if figure is not None]
    told = {table.op for figure in shown for table in figure.tables}
    rest = [table for table in tables(rows) if table.op not in told]
    return [*shown, Figure("rest", "Further measurements", "", None, rest)] if rest else shown


def grid(narrow: bool, plots: Sequence[Callable[[int], str]], lines: Sequence[Series] = (), columns: int = 2) -> str:
    """Plots side by side on a desk, one below the other on a phone; a legend of ``lines`` above them all."""
    above = legend(lines, NARROW if narrow else WIDE) if lines else ""
    if narrow:
        return beside([plot(NARROW) for plot in plots], 1, GAP, above)
    columns = min(columns, len(plots))
    return beside([plot((WIDE - GAP * (columns - 1)) // columns) for plot in plots], columns, GAP, above)


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


# The token step.


def step(rows: list[dict], found: list[Table]) -> Figure:
    lengths = [row["tokens"] for row in rows]
    base = max(set(lengths), key=lambda n: (lengths.count(n), -n))
    at_base = [row for row in rows if row["tokens"] == base]
    growing = [n for n in ticks_of(rows, "rows") if len({row["tokens"] for row in rows if row["rows"] == n}) > 1]

    def floor(some, x):
        points = sorted({(row[x], row["floor_ms"]) for row in some if "floor_ms" in row})
        return [Series("plain read of the same bytes", points, "floor", area=True)] if len(points) > 1 else []

    def by_rows(width):
        lines = [*peer_series(at_base, "rows", "ms"), *own_series(at_base, "rows", "ms", "{:.3g}".format)]
        under = floor(at_base, "rows")
        ticks = ticks_of(at_base, "rows")
        x = log_axis(ticks, "rows (two a guided request)", ticks, pad=1.1)
        y = log_axis(values([*lines, *under]), "milliseconds", pad=1.35)
        return draw(width, x, y, f"a step at {base} cached tokens", under, lines, [*lines, *under])

    def by_tokens(width):
        lines, under = [], []
        for i, n in enumerate(growing):
            some = [row for row in rows if row["rows"] == n]
            ours = next(iter(own_rows(some).values()))
            points = sorted((row["tokens"], row["ms"]) for row in ours)
            labels = [f"{y:.3g}" for _, y in points]
            lines.append(Series(f"{n} rows", points, "own" if i == 0 else "own2", labels))
            floors = sorted((row["tokens"], row["floor_ms"]) for row in ours if "floor_ms" in row)
            under.append(Series(f"plain read, {n} rows", floors, "grey", dashed=True))
        ticks = ticks_of([row for row in rows if row["rows"] in growing], "tokens")
        x = log_axis(ticks, "cached tokens", ticks, pad=1.1)
        y = log_axis(values([*lines, *under]), "milliseconds", pad=1.35)
        return draw(width, x, y, "growth with the cache", [], [*under, *lines], [*lines, *under])

    plots = [by_rows] + ([by_tokens] if growing else [])
    close = min((row["floor_ratio"] for row in rows if "floor_ratio" in row), default=None)
    text = "One token for every row, from the last tokens to the drawn ones."
    if close is not None:
        text += (
            f" No step can be quicker than reading its weights and cache once; the closest is {close:.2f} times that."
        )
    best = [row["ratio_best"] for row in at_base if "ratio_best" in row]
    if best:
        text += f" {min(best):.1f} to {max(best):.1f} times as fast as the quickest peer."
    return Figure("step", "Token step", text, lambda narrow: grid(narrow, plots), found)


def draw(width, x: Axis, y: Axis, title: str, areas, lines, legend) -> str:
    plot = Plot(width, 330, x, y, title, legend)
    for one in [*areas, *lines]:
        plot.add(one)
    return plot.svg(title)


# Attention.


def forward(rows: list[dict], found: list[Table]) -> Figure | None:
    square = [row for row in rows if row["s"] == row["s_k"] and row["window"] < 0 and row["heads"] == row["heads_kv"]]
    kinds = sorted({(row["d"], row["causal"]) for row in square})
    kinds = [kind for kind in kinds if len({r["s"] for r in square if (r["d"], r["causal"]) == kind}) > 1]
    if not kinds:
        return None
    everything = [*own_series(square, "s", "tflops"), *peer_series(square, "s", "tflops")]
    y = axis_from_zero(max(values(everything)), "TFLOP/s")

    def plot_of(kind):
        some = [row for row in square if (row["d"], row["causal"]) == kind]

        def plot(width):
            lines = [*peer_series(some, "s", "tflops"), *reversed(own_series(some, "s", "tflops"))]
            lengths = ticks_of(some, "s")
            title = f"head dim {kind[0]}, {'causal' if kind[1] else 'full'}"
            x = log_axis(lengths, "sequence length", lengths, pad=1.08)
            return draw(width, x, y, title, [], lines, ())

        return plot

    text = "Forward pass by sequence length; higher is faster. Half of the operations count where the mask is causal."
    own = [row for rows_of in list(own_rows(square).values())[:1] for row in rows_of if "ratio_best" in row]
    if own:
        first = sum(row["ratio_best"] >= 1 for row in own)
        text += f" First among all measured in {first} of {len(own)} cells."
    plots = [plot_of(kind) for kind in kinds]
    return Figure("attention", "Attention", text, lambda narrow: grid(narrow, plots, everything), found)


def decode(rows: list[dict], found: list[Table]) -> Figure | None:
    if len({row["kv_mb"] for row in rows}) < 2:
        return None
    kinds = list(dict.fromkeys((row["d"], row["hq"], row["hkv"]) for row in rows))
    ceiling = max((row.get("read_gb_s", 0) for row in rows), default=0)
    top = max(row[key] for row in rows for key in row if key == "gbps" or key.startswith("gbps_"))
    y = axis_from_zero(max(top, ceiling), "GB/s of keys and values")

    def plot_of(kind):
        some = [row for row in rows if (row["d"], row["hq"], row["hkv"]) == kind]

        def plot(width):
            lines = [*peer_series(some, "kv_mb", "gbps"), *own_series(some, "kv_mb", "gbps")]
            title = f"{kind[1]} query heads over {kind[2]}, head dim {kind[0]}"
            x = log_axis(ticks_of(some, "kv_mb"), "MB of keys and values", pad=1.1)
            made = Plot(width, 320, x, y, title)
            if ceiling:
                made.level(ceiling, "torch's sum reads")
            for one in lines:
                made.add(best_of(one))
            return made.svg(title)

        return plot

    text = "One query a row over its cache, inside a CUDA graph. A small cache stays in L2 between calls."
    plots = [plot_of(kind) for kind in kinds]
    every = [*own_series(rows, "kv_mb", "gbps"), *peer_series(rows, "kv_mb", "gbps")]
    return Figure("decode", "Decode attention", text, lambda narrow: grid(narrow, plots, every), found)


def best_of(series: Series) -> Series:
    """Of several points at one x the highest: shapes of one size."""
    highest: dict[float, float] = {}
    for x, y in series.points:
        highest[x] = max(y, highest.get(x, 0))
    return Series(series.name, sorted(highest.items()), series.style)


def overhead(rows: list[dict], found: list[Table]) -> Figure:
    items = []
    for language in dict.fromkeys(row["from"] for row in rows):
        some = [row for row in rows if row["from"] == language]
        for row in some:
            items.append((f"{row['call']}, {language}", row["us"], f"{row['us']:.1f} µs", "own"))
        torchs = next((row["us_sdpa"] for row in some if "us_sdpa" in row), None)
        if torchs is not None:
            items.append((f"torch's SDPA, {language}", torchs, f"{torchs:.1f} µs", "blue"))
    text = "What one call costs the host: checks, dispatch, launch. It bounds short calls outside of CUDA graphs."
    return Figure("overhead", "Cost of a call", text, lambda narrow: bars(*wide(narrow, items)), found)


def wide(narrow: bool, items):
    return (NARROW if narrow else WIDE), items, "", not narrow


# Generation.


def speed(rows: list[dict], found: list[Table]) -> Figure | None:
    own = [row for row in rows if row["implementation"] == "vivace"]
    models = list(dict.fromkeys(row["model"] for row in own))
    batches = ticks_of(own, "requests")
    if len(batches) < 2:
        return None
    styles = ("own", "blue", "teal", "violet", "own2", "grey")

    def lines(name, text=None):
        made = []
        for i, model in enumerate(models):
            points = sorted((row["requests"], row[name]) for row in own if row["model"] == model and row.get(name))
            labels = [text(y) for _, y in points] if text and i == 0 else []
            title = "vivace" if len(models) == 1 else model
            made.append(Series(title, points, styles[i % len(styles)], labels))
        return [one for one in made if one.points]

    x = log_axis(batches, "requests at once", batches, pad=1.12)

    def rate(width):
        shown = lines("tokens_per_s", "{:,.0f}".format)
        y = log_axis(values(shown), "speech tokens a second, all requests together", pad=1.5)
        return draw(width, x, y, "throughput", [], shown, shown if len(shown) > 1 else ())

    memory = "vram_peak_gib" if any(row.get("vram_peak_gib") for row in own) else "rss_peak_gib"

    def vram(width):
        shown = lines(memory, "{:.1f}".format)
        planned = sorted({(row["requests"], row["plan_gib"]) for row in own if "plan_gib" in row})
        legend = list(shown)
        if planned:
            legend.append(Series("vivace plan", planned, "grey", dashed=True))
        levels = (12, 24) if memory == "vram_peak_gib" else ()
        y = axis_from_zero(max([*values(legend), *(level * 1.04 for level in levels)]), "GiB of the whole process")
        title = "GPU memory at its peak" if levels else "resident memory at its peak"
        plot = Plot(width, 330, x, y, title, legend if len(legend) > 1 else ())
        for level in levels:
            plot.level(level, f"{level} GB card")
        for one in [*legend[len(shown) :], *shown]:
            plot.add(one)
        return plot.svg(title)

    tokens = max(row["max_tokens"] for row in own)
    text = f"Requests of {tokens:,} tokens ({tokens / 25:g} s of speech) on the C++ engine."
    best = max(own, key=lambda row: row["tokens_per_s"])
    text += f" {best['requests']} at once make {best['tokens_per_s']:,.0f} tokens a second"
    text += f" in {best[memory]:.1f} GiB." if best.get(memory) else "."
    return Figure("generate", "Throughput and memory", text, lambda narrow: grid(narrow, [rate, vram]), found)


def real_time(rows: list[dict], found: list[Table]) -> Figure | None:
    one = [row for row in rows if row["requests"] == 1]
    if not one:
        return None
    one.sort(key=lambda row: row["rtf"])
    several = len({row["model"] for row in one if row["implementation"] == "vivace"}) > 1

    def name(row):
        if row["implementation"] != "vivace":
            return f"{row['implementation']}, {row.get('dtype', '')}".rstrip(", ")
        return f"vivace, {row['model'] if several else row.get('dtype', '')}".rstrip(", ")

    items = [
        (
            name(row),
            row["rtf"],
            f"{row['rtf']:.0f} ×" if row["rtf"] >= 100 else f"{row['rtf']:.1f} ×",
            "own" if row["implementation"] == "vivace" else "blue",
        )
        for row in one
    ]
    text = "Seconds of speech (25 tokens each) made in a second, for one request from its text to its last token."
    return Figure("real-time", "Times real time", text, lambda narrow: bars(*wide(narrow, items)), found)


# Figures of the head of the page.


def heads(rows: Sequence[dict]) -> list[tuple[str, str]]:
    """The few numbers that a reader should take away: (number, what it is)."""
    whole = [row for row in rows if "error" not in row]
    found = []
    one = [r for r in whole if r["op"] == "generate" and r["implementation"] == "vivace" and r["requests"] == 1]
    if one:
        best = max(one, key=lambda row: row["rtf"])
        found.append(
            (f"{best['rtf']:.0f} ×", f"real time for one request; first token after {best['first_token_ms']:.0f} ms")
        )
    many = [r for r in whole if r["op"] == "generate" and r["implementation"] == "vivace" and r["requests"] > 1]
    if many:
        best = max(many, key=lambda row: row["tokens_per_s"])
        found.append((f"{best['tokens_per_s']:,.0f}", f"tokens a second with {best['requests']} requests at once"))
    steps = [r for r in whole if r["op"] == "step" and r["rows"] == 2]
    if steps:
        best = min(steps, key=lambda row: row["ms"])
        told = f"for a token step of one guided request at {best['tokens']} tokens"
        if "floor_ratio" in best:
            told += f", {best['floor_ratio']:.2f} times its byte floor"
        found.append((f"{best['ms']:.3g} ms", told))
    cells = [r for r in whole if r["op"] == "forward" and "ratio_best" in r and r.get("arch") in ("sm90a", "cpu")]
    if cells:
        top = max(cells, key=lambda row: row["tflops"])
        rate = f"{top['tflops']:.0f} TFLOP/s" if top["tflops"] >= 10 else f"{top['tflops']:.2g} TFLOP/s"
        ahead = sum(row["ratio_best"] >= 1 for row in cells)
        found.append(
            (rate, f"attention forward at its best; ahead of every peer measured in {ahead} of {len(cells)} cells")
        )
    return found
