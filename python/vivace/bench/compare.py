"""`vivace bench compare A.json B.json`: what became slower or faster beyond the noise. No torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vivace.bench import output
from vivace.bench.machine_facts import differences

SLOWER_STATUS = 3
OTHER_MACHINE_STATUS = 4


@dataclass(frozen=True)
class Figure:
    """A figure of a row that is worth comparing; with quartiles where the row has them."""

    name: str
    unit: str
    less_is_better: bool = True


FIGURES = {
    "forward": (Figure("us", "us"),),
    "varlen": (Figure("us", "us"),),
    "decode": (Figure("us", "us"),),
    "overhead": (Figure("us", "us"),),
    "step": (Figure("ms", "ms"),),
    "generate": (
        Figure("seconds", "s"),
        Figure("first_token_ms", "ms to the first token"),
        Figure("vram_peak_gib", "GiB at the peak"),
    ),
}
#: What tells the rows of one case apart.
PARTS = ("call", "from", "arch", "implementation", "model")
#: Settings that have to be the same for the figures to mean the same.
SETTINGS = ("seed", "warmup", "tokens", "max_tokens", "text")


@dataclass(frozen=True)
class Change:
    """One figure of one case in both runs. verdict: "slower", "faster", "same", "more", "less"."""

    case: str
    figure: Figure
    before: float
    after: float
    verdict: str

    @property
    def percent(self) -> float:
        return 100 * (self.after / self.before - 1)

    @property
    def worse(self) -> bool:
        return self.verdict in ("slower", "more")


def execute(arguments: argparse.Namespace) -> int:
    """Prints the changes.

    Returns:
        0: nothing is worse; 3: something is; 4: the machines differ.
    """
    before, after = output.read(arguments.before), output.read(arguments.after)
    if not before or not after:
        raise ValueError(f"vivace bench compare: {arguments.after if before else arguments.before} has no rows")
    machines = differences(before[0], after[0])
    if machines and not arguments.different_machines:
        print(
            f"vivace bench compare: the runs are of different machines ({'; '.join(machines)}); "
            "--different-machines compares them all the same",
            file=sys.stderr,
        )
        return OTHER_MACHINE_STATUS
    notes = [f"different machines: {text}" for text in machines]
    threshold = arguments.threshold
    if before[0].get("unit") != after[0].get("unit"):
        threshold = max(threshold, arguments.other_unit_threshold)
        notes.append(f"two units of one kind of GPU: changes below {threshold:g} % are taken for noise")
    versions = [text for text in differences(before[0], after[0], strict=True) if text not in machines]
    notes += [text for text in versions if not text.startswith("unit")]
    changes, more = compare(before, after, threshold)
    notes += more
    if not changes:
        raise ValueError("vivace bench compare: the runs have no case in common")
    worse = any(change.worse for change in changes)
    if arguments.format == "json":
        rows = [
            {
                "case": c.case,
                "figure": c.figure.name,
                "before": c.before,
                "after": c.after,
                "percent": round(c.percent, 2),
                "verdict": c.verdict,
            }
            for c in changes
        ]
        print(json.dumps({"worse": worse, "threshold_percent": threshold, "notes": notes, "changes": rows}, indent=1))
    else:
        print(text(changes, notes, threshold, arguments.all))
    return SLOWER_STATUS if worse else 0


def compare(before: Sequence[dict], after: Sequence[dict], threshold: float) -> tuple[list[Change], list[str]]:
    """The figures that both runs have, in the order of the second; and what else a reader has to know.

    A change counts where it is above ``threshold`` percent and the quartiles of the samples do not overlap.
    """
    known = {identity(row): row for row in before}
    changes, notes, matched = [], [], set()
    for row in after:
        key = identity(row)
        old = known.get(key)
        if old is None:
            notes.append(f"only in the second run: {key}")
            continue
        matched.add(key)
        if "error" in row or "error" in old:
            if ("error" in row) != ("error" in old):
                which = "second" if "error" in row else "first"
                notes.append(f"failed in the {which} run: {key}: {row.get('error', old.get('error'))}")
            continue
        if different := [name for name in SETTINGS if row.get(name) != old.get(name) and name in row and name in old]:
            notes.append(f"not compared, {different[0]} is {old[different[0]]} and {row[different[0]]}: {key}")
            continue
        if row.get("hash") != old.get("hash"):
            notes.append(f"another output: {key}")
        for figure in FIGURES.get(row["op"], ()):
            if old.get(figure.name) and row.get(figure.name):
                changes.append(change(key, figure, old, row, threshold))
    notes += [f"only in the first run: {key}" for key in known if key not in matched]
    return changes, notes


def identity(row: dict) -> str:
    parts = [str(row[name]) for name in PARTS if row.get(name) not in (None, "", "auto")]
    return ", ".join([row.get("case") or row["op"], *parts])


def change(case: str, figure: Figure, old: dict, new: dict, threshold: float) -> Change:
    before, after = old[figure.name], new[figure.name]
    percent = 100 * (after / before - 1)
    worse, better = ("more", "less") if figure.unit.startswith("GiB") else ("slower", "faster")
    up = (old.get(f"{figure.name}_q3", before), new.get(f"{figure.name}_q1", after))
    down = (new.get(f"{figure.name}_q3", after), old.get(f"{figure.name}_q1", before))
    verdict = "same"
    if percent > threshold and up[0] < up[1]:
        verdict = worse if figure.less_is_better else better
    elif percent < -threshold and down[0] < down[1]:
        verdict = better if figure.less_is_better else worse
    return Change(case, figure, before, after, verdict)


def text(changes: Sequence[Change], notes: Sequence[str], threshold: float, everything: bool) -> str:
    """For people: the worst first."""
    lines = [f"- {note}" for note in notes]
    shown = [c for c in changes if everything or c.verdict != "same"]
    shown.sort(key=lambda c: -c.percent)
    if shown:
        lines += ["", "| change | before | after | | case |", "|-------:|-------:|------:|:--|:-----|"]
        lines += [
            f"| {c.percent:+.1f}% | {c.before:g} | {c.after:g} | {c.figure.unit}, {c.verdict} | {c.case} |"
            for c in shown
        ]
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "faster", "more", "less")}
    told = [f"{counts['slower']} slower", f"{counts['faster']} faster"]
    if counts["more"] or counts["less"]:
        told += [f"{counts['more']} with more memory", f"{counts['less']} with less"]
    same = sum(c.verdict == "same" for c in changes)
    lines += ["", f"{', '.join(told)}, {same} within the noise ({threshold:g} % or overlapping quartiles)."]
    return "\n".join(lines).lstrip("\n")
