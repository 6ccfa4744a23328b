"""The tables that people read, of any run's rows. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vivace import plan

#: Columns that tell the rows of an operator apart; those of one value, or none, are left out where `*`.
COLUMNS = {
    "forward": ("d", "mask", "s", "s_k*", "window*", "batch*", "heads*", "heads_kv*", "dtype*", "arch*"),
    "varlen": ("d", "mask", "lengths", "window*", "heads", "heads_kv*", "dtype*", "arch*"),
    "decode": ("d", "hq", "hkv*", "rows", "s", "page*", "kv_mb", "in_l2*", "dtype*", "arch*"),
    "overhead": ("call", "from*", "dtype*", "arch*"),
    "step": ("rows", "requests*", "tokens", "model*", "shape*", "dtype*", "arch*", "path*"),
    "generate": ("requests", "implementation", "model*", "cfg_weight*", "max_tokens*", "dtype*"),
}
#: What the rows of an operator are sorted by; those of the others stay as they were measured.
ORDER = {"step": ("tokens", "rows"), "generate": ("requests",)}
#: Columns that are left out where this product is the same in all rows.
PRODUCTS = {"batch": "s", "heads": "d"}
#: Which column holds the figure that the peers are compared by, its heading, and the share of the ceiling.
RATE = {
    "forward": ("tflops", "TFLOP/s", "percent_matmul", "of matmul"),
    "varlen": ("tflops", "TFLOP/s", "percent_matmul", "of matmul"),
    "decode": ("us", "us", "percent_read", "of read"),
    "overhead": ("us", "us", None, None),
    "step": ("ms", "ms", "percent_read", "of read"),
}
TITLES = {
    "forward": "Forward, TFLOP/s (ratios above 1: vivace is faster)",
    "varlen": "Packed sequences, TFLOP/s (ratios above 1: vivace is faster)",
    "decode": "Decoding, microseconds a call (ratios above 1: vivace is faster)",
    "overhead": "Cost of one call on the host, microseconds",
    "step": "Token step, milliseconds (ratios above 1: vivace is faster)",
    "generate": "Generation of whole requests",
}
#: Heading and row key of generate's figures, and digits behind the point.
GENERATE = (
    ("tokens", "tokens", 0),
    ("positions", "positions", 0),
    ("tokens/s", "tokens_per_s", 0),
    ("x real time", "rtf", 1),
    ("ms a step", "ms_per_step", 3),
    ("first token, ms", "first_token_ms", 1),
    ("peak GiB", "vram_peak_gib", 2),
    ("steady GiB", "vram_steady_gib", 2),
    ("peak RSS GiB", "rss_peak_gib", 2),
    ("planned GiB", "plan_gib", 2),
    ("aim GiB", "vram_aim_gib", 2),
)


@dataclass
class Table:
    """headings and lines of text; ``constants``: what is the same in all rows; ``note``: a sentence below."""

    op: str
    title: str
    headings: list[str]
    lines: list[list[str]]
    constants: str = ""
    note: str = ""
    left: set[int] = field(default_factory=set)  # columns of words


def tables(rows: Sequence[dict]) -> list[Table]:
    """One table for each operator in the rows, in the order of COLUMNS."""
    found = []
    for op in COLUMNS:
        some = [row for row in rows if row["op"] == op]
        some.sort(key=lambda row: [row.get(name, 0) for name in ORDER.get(op, ())])
        if some:
            found.append(generate_table(some) if op == "generate" else timing_table(op, some))
    return found


def timing_table(op: str, rows: Sequence[dict]) -> Table:
    columns, constants = key_columns(op, rows)
    rate, heading, share, share_heading = RATE[op]
    columns.append((f"vivace {heading}", [number(row.get(rate)) for row in rows]))
    columns.append(spread_column(rows))
    if any("gbps" in row for row in rows):
        columns.append(("GB/s", [number(row.get("gbps")) for row in rows]))
    if share is not None and any(share in row for row in rows):
        columns.append((share_heading, [f"{row[share]:.0f}%" if share in row else "-" for row in rows]))
    if any("floor_ms" in row for row in rows):
        columns.append(("floor", [number(row.get("floor_ms")) for row in rows]))
        columns.append(("x floor", [ratio(row.get("floor_ratio")) for row in rows]))
    names = peers_of(rows)
    columns += [(name, [number(row.get(f"{rate}_{name}")) for row in rows]) for name in names]
    columns += [(f"/ {name}", [ratio(row.get(f"ratio_{name}")) for row in rows]) for name in names]
    if len(names) > 1:
        columns.append(("/ best", [ratio(row.get("ratio_best")) for row in rows]))
    if any("bar" in row for row in rows):
        columns.append(("bar", [ratio(row.get("bar")) for row in rows]))
    table = Table(op, TITLES[op], [h for h, _ in columns], transpose(columns), constants)
    end(table, rows)
    bars = [row for row in rows if "bar" in row and "ratio_cudnn" in row]
    if bars:
        held = sum(row["ratio_cudnn"] >= row["bar"] for row in bars)
        table.note = f"At or above the bar in {held} of {len(bars)} cells."
    return table


def spread_column(rows: Sequence[dict]) -> tuple[str, list[str]]:
    """The distance of the quartiles over the median; of a single sample there is none."""
    spread = [row.get("spread_percent") if row.get("samples", 2) > 1 else None for row in rows]
    return "±", ["-" if value is None else f"{value:.1f}%" for value in spread]


def generate_table(rows: Sequence[dict]) -> Table:
    columns, constants = key_columns("generate", rows)
    # Of a run that is older than this version's planner: what this one says.
    rows = [row | {"plan_gib": plan.predict_row(row) / plan.GIB} if "plan_gib" in row else row for row in rows]
    for heading, name, digits in GENERATE:
        if any(row.get(name) is not None for row in rows):
            values = [row.get(name) for row in rows]
            columns.append((heading, ["-" if v is None else f"{v:,.{digits}f}" for v in values]))
        if name == "tokens_per_s" and any(row.get("samples", 1) > 1 for row in rows):
            columns.append(spread_column(rows))
    table = Table("generate", TITLES["generate"], [h for h, _ in columns], transpose(columns), constants)
    table.left = {i for i, h in enumerate(table.headings) if h in ("implementation", "model")}
    end(table, rows)
    if any(row.get("short") for row in rows):
        table.note = "Requests that drew the stop token ended early: tokens says how many there were."
    return table


def end(table: Table, rows: Sequence[dict]) -> None:
    """The last column: the hash of the output, or why there is none."""
    if any("hash" in row or "error" in row for row in rows):
        table.headings.append("output")
        for line, row in zip(table.lines, rows, strict=True):
            line.append(row["error"][:80] if "error" in row else row.get("hash", "-"))


def transpose(columns) -> list[list[str]]:
    return [list(line) for line in zip(*(values for _, values in columns), strict=True)]


def markdown(table: Table) -> list[str]:
    """Lines of a table, its title first, aligned so that a terminal reads as well as a browser."""
    widths = [max(len(heading), *(len(line[i]) for line in table.lines)) for i, heading in enumerate(table.headings)]

    def put(cells):
        aligned = [
            c.ljust(w) if i in table.left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    rules = ["-" * (w + 2) if i in table.left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    lines = [f"**{table.title}**{table.constants}", "", put(table.headings), "|" + "|".join(rules) + "|"]
    lines += [put(line) for line in table.lines]
    return lines + (["", table.note] if table.note else [])


def peers_of(rows: Sequence[dict]) -> list[str]:
    """Names of the peers in the rows, in the order of their first figure."""
    names = dict.fromkeys(key[3:] for row in rows for key in row if key.startswith(("us_", "ms_")))
    return [name for name in names if name not in ("q1", "q3", "min")]


def key_columns(op: str, rows: Sequence[dict]) -> tuple[list, str]:
    """(heading, text of each row) of the columns that tell the rows apart, and what is the same in all."""
    columns, constants = [], []
    for name in COLUMNS[op]:
        heading = name.rstrip("*")
        values = [cell_text(row, heading) for row in rows]
        if not name.endswith("*"):
            columns.append((heading, values))
            continue
        told, value = heading, set(values)
        if heading in PRODUCTS and all({heading, PRODUCTS[heading]} <= row.keys() for row in rows):
            told = f"{heading} * {PRODUCTS[heading]}"
            value = {str(row[heading] * row[PRODUCTS[heading]]) for row in rows}
        if len(value) > 1:
            columns.append((heading, values))
        elif not value & {"", "all", "no"}:
            constants.append(f"{told} {value.pop()}")
    return columns, f": {', '.join(constants)}" if constants else ""


def cell_text(row: dict, name: str) -> str:
    if name == "mask":
        return "causal" if row.get("causal") else "full"
    value = row.get(name, "")
    if (name == "s_k" and value == row.get("s")) or (name, value) in (
        ("heads_kv", row.get("heads")),
        ("hkv", row.get("hq")),
        ("page", 0),
    ):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "kv_mb" and name in row:
        return number(value)
    return "all" if name == "window" and value == -1 else str(value)


def number(value) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def ratio(value) -> str:
    return "-" if value is None else f"{value:.2f}"
