"""Which figures a set of rows gives, and the few numbers at the head of the page."""

from collections.abc import Sequence

from vivace.bench.tables import tables
from vivace.report.attention import decode, forward, overhead
from vivace.report.chart import Figure
from vivace.report.generation import real_time, speed
from vivace.report.step import step


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
