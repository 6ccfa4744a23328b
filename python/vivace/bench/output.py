"""Writing and reading runs: markdown for people, CSV and JSON for programs. No torch."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

#: Columns of a CSV whose values stay text, whatever they look like.
TEXT = {"gpu", "driver", "cuda", "cudnn", "torch", "python", "vivace", "cpu", "hash", "lengths", "arch", "date"}

#: Columns of the tables for people, by operator; those of one value, or none, are left out where `*`.
COLUMNS = {
    "forward": ("d", "mask", "s", "s_k*", "window*", "batch*", "heads*", "heads_kv*", "dtype*", "arch*"),
    "varlen": ("d", "mask", "lengths", "window*", "heads", "heads_kv*", "dtype*", "arch*"),
    "decode": ("d", "heads", "heads_kv*", "rows", "kv", "kv_mb", "in_l2*", "dtype*", "arch*"),
    "overhead": ("call", "dtype*", "arch*"),
}
#: Columns that are left out where this product is the same in all rows.
PRODUCTS = {"batch": "s", "heads": "d"}
#: Which column holds the rate, its heading, and the share of the ceiling.
RATE = {
    "forward": ("tflops", "TFLOP/s", "percent_matmul", "of matmul"),
    "varlen": ("tflops", "TFLOP/s", "percent_matmul", "of matmul"),
    "decode": ("us", "us", "percent_read", "of read"),
    "overhead": ("us", "us", None, None),
}
LABELS = {
    "gpu": ("GPU", ""),
    "cpu": ("CPU", ""),
    "cuda": ("CUDA", ""),
    "cudnn": ("cuDNN", ""),
    "power_limit_w": ("power limit", " W"),
    "clock_max_mhz": ("highest clock", " MHz"),
    "matmul_tflops": ("matrix product", " TFLOP/s"),
    "copy_gb_s": ("copy, read and write", " GB/s"),
    "read_gb_s": ("read", " GB/s"),
    "clock_mhz_min": ("lowest clock of the run", " MHz"),
    "clock_mhz_median": ("median clock of the run", " MHz"),
}
TITLES = {
    "forward": "Forward, TFLOP/s (ratios above 1: vivace is faster)",
    "varlen": "Packed sequences, TFLOP/s (ratios above 1: vivace is faster)",
    "decode": "Decoding, microseconds a call (ratios above 1: vivace is faster)",
    "overhead": "Cost of one call on the host, microseconds",
}


def render(rows: Sequence[dict], form: str, facts: dict | None = None, notes: Sequence[str] = ()) -> str:
    """The rows as "md", "csv" or "json"; the facts of the machine and notes head the markdown."""
    if form == "json":
        return "[\n" + ",\n".join(" " + json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
    if form == "csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_text(value) for name, value in row.items()} for row in rows)
        return text.getvalue()
    parts = [fact_text(name, value) for name, value in (facts or {}).items()]
    lines = ["", *(f"- {part}" for part in parts), *(f"- **{note}**" for note in notes)] if parts or notes else []
    for op in COLUMNS:
        some = [row for row in rows if row["op"] == op]
        if some:
            columns, constants = key_columns(op, some)
            lines += ["", f"**{TITLES[op]}**{constants}", "", *table(op, some, columns)]
            bars = [row for row in some if "bar" in row and "ratio_cudnn" in row]
            if bars:
                held = sum(row["ratio_cudnn"] >= row["bar"] for row in bars)
                lines += ["", f"At or above the bar in {held} of {len(bars)} cells."]
    return "\n".join(lines).lstrip("\n") + "\n"


def parse(text: str, form: str) -> list[dict]:
    """What `render` wrote as "csv" or "json"."""
    if form == "json":
        return json.loads(text)
    if form != "csv":
        raise ValueError(f"vivace bench: a run is read from csv or json, not from {form}")
    return [
        {name: value if name in TEXT else csv_value(value) for name, value in row.items() if value != ""}
        for row in csv.DictReader(io.StringIO(text))
    ]


def write(path: Path, text: str) -> None:
    """Replaces the file as a whole, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def csv_text(value) -> str:
    return json.dumps(value) if isinstance(value, bool | int | float) else "" if value is None else str(value)


def csv_value(text: str):
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def fact_text(name: str, value) -> str:
    label, unit = LABELS.get(name, (name.replace("_", " "), ""))
    return f"{label}: {value}{unit}"


def peers_of(rows: Sequence[dict]) -> list[str]:
    """Names of the peers in the rows, in the order of their first figure."""
    names = dict.fromkeys(key[3:] for row in rows for key in row if key.startswith("us_"))
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
        if heading in PRODUCTS and all(PRODUCTS[heading] in row for row in rows):
            told = f"{heading} * {PRODUCTS[heading]}"
            value = {str(row[heading] * row[PRODUCTS[heading]]) for row in rows}
        if len(value) > 1:
            columns.append((heading, values))
        elif not value & {"", "all", "no"}:
            constants.append(f"{told} {value.pop()}")
    return columns, f": {', '.join(constants)}" if constants else ""


def table(op: str, rows: Sequence[dict], columns: list) -> list[str]:
    rate, heading, share, share_heading = RATE[op]
    columns.append((f"vivace {heading}", [number(row.get(rate)) for row in rows]))
    columns.append(("±", [f"{number(row.get('spread_percent'))}%" if "spread_percent" in row else "-" for row in rows]))
    if op == "decode":
        columns.append(("GB/s", [number(row.get("gb_s")) for row in rows]))
    if share is not None and any(share in row for row in rows):
        columns.append((share_heading, [f"{row[share]:.0f}%" if share in row else "-" for row in rows]))
    names = peers_of(rows)
    columns += [(name, [number(row.get(f"{rate}_{name}")) for row in rows]) for name in names]
    columns += [(f"/ {name}", [ratio(row.get(f"ratio_{name}")) for row in rows]) for name in names]
    if len(names) > 1:
        columns.append(("/ best", [ratio(row.get("ratio_best")) for row in rows]))
    if any("bar" in row for row in rows):
        columns.append(("bar", [ratio(row.get("bar")) for row in rows]))
    if any("hash" in row for row in rows):
        columns.append(("output", [row.get("error", row.get("hash", "-"))[-40:] for row in rows]))
    widths = [max(len(heading), *map(len, values)) for heading, values in columns]
    lines = ["| " + " | ".join(h.rjust(w) for (h, _), w in zip(columns, widths, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    for line in zip(*(values for _, values in columns), strict=True):
        lines.append("| " + " | ".join(v.rjust(w) for v, w in zip(line, widths, strict=True)) + " |")
    return lines


def cell_text(row: dict, name: str) -> str:
    if name == "mask":
        return "causal" if row.get("causal") else "full"
    value = row.get(name, "")
    if name == "s_k" and value == row.get("s"):
        return ""
    if name == "heads_kv" and value == row.get("heads"):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if name == "window" and value == -1 else str(value)


def number(value) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def ratio(value) -> str:
    return "-" if value is None else f"{value:.2f}"
