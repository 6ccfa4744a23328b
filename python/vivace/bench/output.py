"""Writing and reading runs: markdown for people, CSV and JSON for programs. No torch."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from vivace.bench import tables

#: Columns of a CSV whose values stay text, whatever they look like.
TEXT = {"gpu", "unit", "driver", "cuda", "cudnn", "torch", "python", "vivace", "commit", "cpu", "hash", "lengths"}
TEXT |= {"arch", "date", "case", "model", "shape", "text"}

LABELS = {
    "gpu": ("GPU", ""),
    "cpu": ("CPU", ""),
    "cuda": ("CUDA", ""),
    "cudnn": ("cuDNN", ""),
    "memory_gib": ("memory", " GiB"),
    "power_limit_w": ("power limit", " W"),
    "clock_max_mhz": ("highest clock", " MHz"),
    "matmul_tflops": ("matrix product", " TFLOP/s"),
    "copy_gb_s": ("copy, read and write", " GB/s"),
    "read_gb_s": ("read", " GB/s"),
    "clock_mhz_min": ("lowest clock of the run", " MHz"),
    "clock_mhz_median": ("median clock of the run", " MHz"),
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
    for table in tables.tables(rows):
        lines += ["", *tables.markdown(table)]
    return "\n".join(lines).lstrip("\n") + "\n"


def parse(text: str, form: str) -> list[dict]:
    """What `render` wrote as "csv" or "json".

    Raises:
        ValueError: it is neither, or not a run.
    """
    if form == "json":
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "op" in row for row in rows):
            raise ValueError("vivace bench: the file holds no run (a list of objects with an op)")
        return rows
    if form != "csv":
        raise ValueError(f"vivace bench: a run is read from csv or json, not from {form}")
    return [
        {name: value if name in TEXT else csv_value(value) for name, value in row.items() if value != ""}
        for row in csv.DictReader(io.StringIO(text))
    ]


def read(path: Path) -> list[dict]:
    """The rows of a run's file.

    Raises:
        ValueError: the file is not one; names it. OSError: it cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), path.suffix.lstrip("."))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('vivace bench: ')}") from None


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
    return f"{label}: {plain(name, value)}{unit}"


def plain(name: str, value) -> str:
    """A fact's value as people write it: 700 for 700.0, and cuDNN's version with points."""
    if name == "cudnn" and str(value).isdecimal() and len(str(value)) == 5:  # 91900 is 9.19.0
        return f"{int(value) // 10000}.{int(value) // 100 % 100}.{int(value) % 100}"
    return f"{value:g}" if isinstance(value, float) else str(value)
