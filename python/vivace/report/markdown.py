"""Tables for docs/performance.md and the README, of the rows that they quote."""

from collections.abc import Sequence

from vivace import plan
from vivace.bench.tables import markdown, tables
from vivace.report.page import merged_facts, notes_of


def text(rows: Sequence[dict]) -> str:
    """A line on the machine, a short table of each kind for the README, then everything."""
    facts = merged_facts(rows)
    machine = [str(facts.get("gpu") or facts.get("cpu") or "one machine")]
    machine += [f"{facts['power_limit_w']} W"] if "power_limit_w" in facts else []
    machine += [f"driver {facts['driver']}"] if "driver" in facts else []
    machine += [f"torch {facts['torch']}"] if "torch" in facts else []
    machine += [f"CUDA {facts['cuda']}"] if "cuda" in facts else []
    machine += [f"commit {facts['commit']}"] if "commit" in facts else []
    machine += [facts["date"]] if "date" in facts else []
    lines = [", ".join(machine) + ".", *(f"{note}" for note in notes_of(rows))]
    for heading, table in (
        ("Generation", generation(rows)),
        ("Token step", steps(rows)),
        ("Attention", attention(rows)),
    ):
        if table:
            lines += ["", f"### {heading}", "", *table]
    lines += planner(rows)
    lines += ["", "## All of it"]
    for one in tables(rows):
        lines += ["", *markdown(one)]
    return "\n".join(lines) + "\n"


def planner(rows: Sequence[dict]) -> list[str]:
    """What `vivace plan` would take from these rows, and how far it is off with what it has."""
    try:
        found = plan.fit(rows)
    except ValueError:
        return []
    told = f"A process holds {found.process / 1e6:.0f} MB beside weights and cache, and {found.row / 1e6:.1f} MB a row."
    error = plan.largest_error(rows, plan.MEASURED)
    return [
        "",
        told + f" `vivace plan` is off by {error:+.1f} % at most (fitted: {plan.largest_error(rows, found):+.1f} %).",
    ]


def put(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    if not lines:
        return []
    rule = "|" + "|".join(["---"] * len(headings)) + "|"
    return ["| " + " | ".join(headings) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def generation(rows: Sequence[dict]) -> list[str]:
    some = [row for row in rows if row["op"] == "generate" and "error" not in row]
    lines = []
    for row in some:
        who = (
            row["implementation"]
            if row.get("model") in (None, "random")
            else f"{row['implementation']}, {row['model']}"
        )
        lines.append(
            [
                f"{who} ({row.get('dtype', '')})",
                str(row["requests"]),
                f"{row['first_token_ms']:.1f}",
                f"{row['ms_per_step']:.3g}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['rtf']:,.1f}",
                f"{row['vram_peak_gib']:.2f}" if "vram_peak_gib" in row else "-",
            ]
        )
    return put(
        ["", "requests", "first token, ms", "ms a step", "tokens/s", "times real time", "GiB of the process"], lines
    )


def steps(rows: Sequence[dict]) -> list[str]:
    some = [row for row in rows if row["op"] == "step" and "error" not in row]
    lines = [
        [
            str(row["rows"]),
            str(row["tokens"]),
            row["arch"],
            f"{row['ms']:.3f}",
            f"{row['gbps']:,.0f}",
            f"{row['floor_ms']:.3f}" if "floor_ms" in row else "-",
            f"{row['floor_ratio']:.2f}" if "floor_ratio" in row else "-",
            f"{row['peer_ms']:.2f} ({row['peer']})" if "peer" in row else "-",
            f"{row['ratio_best']:.1f}" if "ratio_best" in row else "-",
        ]
        for row in some
    ]
    return put(
        ["rows", "tokens", "kernels", "ms", "GB/s", "floor, ms", "of floor", "best peer, ms", "times as fast"], lines
    )


def attention(rows: Sequence[dict]) -> list[str]:
    """d and mask down, lengths across: TFLOP/s and the ratio to the best peer."""
    some = [row for row in rows if row["op"] == "forward" and "error" not in row and row["s"] == row["s_k"]]
    some = [row for row in some if row["window"] < 0 and row["heads"] == row["heads_kv"]]
    lengths = sorted({row["s"] for row in some})
    lines = []
    for d, causal, arch in dict.fromkeys((row["d"], row["causal"], row["arch"]) for row in some):
        found = {row["s"]: row for row in some if (row["d"], row["causal"], row["arch"]) == (d, causal, arch)}
        cells = []
        for s in lengths:
            row = found.get(s)
            ratio = f" ({row['ratio_best']:.2f})" if row and "ratio_best" in row else ""
            cells.append("-" if row is None else f"{row['tflops']:.3g}{ratio}")
        lines.append([str(d), "causal" if causal else "full", arch, *cells])
    return put(["d", "mask", "kernels", *map(str, lengths)], lines)
