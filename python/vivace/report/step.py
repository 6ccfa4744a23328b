"""The figure of the token step: time by rows and by length, over its byte floor."""

from vivace.bench.tables import Table
from vivace.report.chart import NAMES, Figure, draw, grid, own_rows, own_series, peer_series, ticks_of, values
from vivace.report.svg import Series, log_axis

FLOOR = "plain read of the same bytes"


def step(rows: list[dict], found: list[Table]) -> Figure:
    lengths = [row["tokens"] for row in rows]
    base = max(set(lengths), key=lambda n: (lengths.count(n), -n))
    at_base = [row for row in rows if row["tokens"] == base]
    growing = [n for n in ticks_of(rows, "rows") if len({row["tokens"] for row in rows if row["rows"] == n}) > 1]

    def by_rows(width, head):
        lines = [
            *peer_series(at_base, "rows", "ms"),
            *reversed(own_series(at_base, "rows", "ms", "{:.3g}".format)),
        ]
        for line in lines:
            if line.name == NAMES["compile"]:
                line.labels = [f"{y:.3g}" for _, y in line.points]
            line.below = line.style == "own"
        floors = sorted({(row["rows"], row["floor_ms"]) for row in at_base if "floor_ms" in row})
        under = [Series(FLOOR, floors, "floor", area=True)] if len(floors) > 1 else []
        ticks = ticks_of(at_base, "rows")
        x = log_axis(ticks, "rows (two a guided request)", ticks, pad=1.1)
        y = log_axis(values([*lines, *under]), "milliseconds", pad=1.35)
        legend = sorted([*lines, *under], key=lambda line: {"own": 0, "own2": 1}.get(line.style, 2))
        return draw(width, x, y, f"A step at {base} cached tokens", [*under, *lines], legend, head)

    def by_tokens(width, head):
        lines, under = [], []
        for i, n in enumerate(growing):
            some = [row for row in rows if row["rows"] == n]
            ours = next(iter(own_rows(some).values()))
            points = sorted((row["tokens"], row["ms"]) for row in ours)
            labels = [f"{y:.3g}" for _, y in points]
            lines.append(Series(f"{n} rows", points, ("own", "violet", "teal")[i % 3], labels))
            floors = sorted((row["tokens"], row["floor_ms"]) for row in ours if "floor_ms" in row)
            under.append(Series(FLOOR, floors, "grey", dashed=True))
        ticks = ticks_of([row for row in rows if row["rows"] in growing], "tokens")
        x = log_axis(ticks, "cached tokens", ticks, pad=1.1)
        y = log_axis(values([*lines, *under]), "milliseconds", pad=1.35)
        return draw(width, x, y, "Growth with the cache", [*under, *lines], [*lines, *under[:1]], head)

    plots = [by_rows] + ([by_tokens] if growing else [])
    close = min((row["floor_ratio"] for row in rows if "floor_ratio" in row), default=None)
    text = "One token for every row, from the last tokens to the drawn ones."
    if close is not None:
        text += (
            f" No step can be quicker than reading its weights and cache once; the closest is {close:.2f} times that."
        )
    best = [row["ratio_best"] for row in next(iter(own_rows(at_base).values())) if "ratio_best" in row]
    if best:
        text += f" {min(best):.1f} to {max(best):.1f} times as fast as the quickest peer."
    return Figure("step", "Token step", text, lambda narrow: grid(narrow, plots), found)
