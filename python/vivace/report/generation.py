"""The figures of whole generations: tokens a second and memory by batch, times real time."""

import math

from vivace import plan
from vivace.bench.tables import Table
from vivace.report.chart import HEIGHT, Figure, draw, grid, ticks_of, values, wide
from vivace.report.svg import Plot, Series, axis_from_zero, bars, log_axis

LEVELS = (12, 24)  # GiB of cards that many have


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

    def rate(width, head):
        shown = lines("tokens_per_s", "{:,.0f}".format)
        y = log_axis(values(shown), "speech tokens a second, all requests together", pad=1.5)
        return draw(width, x, y, "Throughput", shown, shown if len(shown) > 1 else (), head)

    memory = "vram_peak_gib" if any(row.get("vram_peak_gib") for row in own) else "rss_peak_gib"

    def vram(width, head):
        shown = lines(memory, lambda gib: f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}")
        planned = sorted({(row["requests"], plan.predict_row(row) / plan.GIB) for row in own if "plan_gib" in row})
        legend = list(shown)
        if planned:
            legend.append(Series("vivace plan", planned, "grey", dashed=True))
        levels = LEVELS if memory == "vram_peak_gib" else ()
        highest = max([*values(legend), *(level * 1.02 for level in levels)])
        step = LEVELS[0] / 2 * math.ceil(highest / (4 * LEVELS[0])) if levels else 0  # cards are on lines of the grid
        y = axis_from_zero(highest, "GiB of the whole process", step=step)
        title = "GPU memory at its peak" if levels else "Resident memory at its peak"
        plot = Plot(width, HEIGHT, x, y, title, legend if len(legend) > 1 else (), head)
        for level in levels:
            plot.level(level, f"{level} GB card")
        for one in [*legend[len(shown) :], *shown]:
            plot.add(one)
        return plot

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
