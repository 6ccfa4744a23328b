"""The figures of attention: forward, decoding, the cost of a call."""

from collections import Counter

from vivace.bench.tables import Table
from vivace.report.chart import HEIGHT, Figure, draw, grid, own_rows, own_series, peer_series, ticks_of, values, wide
from vivace.report.svg import Plot, Series, axis_from_zero, bars, log_axis


def forward(rows: list[dict], found: list[Table]) -> Figure | None:
    square = like_most(
        [row for row in rows if row["s"] == row["s_k"] and row["window"] < 0 and row["heads"] == row["heads_kv"]]
    )
    kinds = sorted({(row["d"], row["causal"]) for row in square})
    kinds = [kind for kind in kinds if len({r["s"] for r in square if (r["d"], r["causal"]) == kind}) > 1]
    if not kinds:
        return None
    everything = [*own_series(square, "s", "tflops"), *peer_series(square, "s", "tflops"), *bar_series(square)]
    y = axis_from_zero(max(values(everything)), "TFLOP/s")

    def plot_of(kind):
        some = [row for row in square if (row["d"], row["causal"]) == kind]

        def plot(width, head):
            own = own_series(some, "s", "tflops", "{:.0f}".format)
            lines = [*bar_series(some), *peer_series(some, "s", "tflops"), *reversed(own)]
            lengths = ticks_of(some, "s")
            title = f"Head dim {kind[0]}, {'causal' if kind[1] else 'full'}"
            x = log_axis(lengths, "sequence length", lengths, pad=1.08)
            return draw(width, x, y, title, lines, head=head)

        return plot

    text = "Forward pass by sequence length; higher is faster. Half of the operations count where the mask is causal."
    own = [row for rows_of in list(own_rows(square).values())[:1] for row in rows_of if "ratio_best" in row]
    if own:
        first = sum(row["ratio_best"] >= 1 for row in own)
        text += f" First among all measured in {first} of {len(own)} cells."
    if bar_series(square):
        text += " Dashed: what flash-attn 3 or 4 would reach by their known ratio to cuDNN, where that is above it."
    plots = [plot_of(kind) for kind in kinds]
    return Figure("attention", "Attention", text, lambda narrow: grid(narrow, plots, everything), found)


def like_most(rows: list[dict]) -> list[dict]:
    """The rows of the commonest number of tokens: on one line the length alone changes."""
    totals = Counter(row["batch"] * row["s"] for row in rows)
    return [row for row in rows if row["batch"] * row["s"] == max(totals, key=totals.get)]


def bar_series(rows: list[dict]) -> list[Series]:
    """The best known rate of cuDNN, flash-attn 3 and 4: the ratio to cuDNN, measured elsewhere, times its rate here."""
    some = [row for row in rows if {"bar", "tflops_cudnn"} <= row.keys()]
    points = sorted({(row["s"], row["bar"] * row["tflops_cudnn"]) for row in some})
    return [Series("best known of cuDNN, flash-attn 3 and 4", points, "grey", dashed=True)] if points else []


def decode(rows: list[dict], found: list[Table]) -> Figure | None:
    in_one_piece = [row for row in rows if not row.get("page")]  # as all the peers have it
    rows = in_one_piece or rows
    if len({row["kv_mb"] for row in rows}) < 2:
        return None
    kinds = list(dict.fromkeys((row["d"], row["hq"], row["hkv"]) for row in rows))
    ceiling = max((row.get("read_gb_s", 0) for row in rows), default=0)
    top = max(row[key] for row in rows for key in row if key == "gbps" or key.startswith("gbps_"))
    y = axis_from_zero(max(top, ceiling), "GB/s of keys and values")

    def plot_of(kind):
        some = [row for row in rows if (row["d"], row["hq"], row["hkv"]) == kind]

        def plot(width, head):
            lines = [*peer_series(some, "kv_mb", "gbps"), *own_series(some, "kv_mb", "gbps")]
            title = f"{kind[1]} query heads over {kind[2]}, head dim {kind[0]}"
            x = log_axis(ticks_of(some, "kv_mb"), "MB of keys and values", pad=1.1)
            made = Plot(width, HEIGHT, x, y, title, head=head)
            if ceiling:
                made.level(ceiling, "torch's sum reads at this rate")
            for one in lines:
                made.add(best_of(one))
            return made

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
