"""What `vivace bench`'s subjects share: cases in turn, rows kept after each, Ctrl-C, --resume, notes, printing."""

import argparse
import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from vivace.bench import machine, machine_facts, output, timing
from vivace.bench.arguments import FORMATS
from vivace.bench.progress import Progress


class Case(Protocol):
    """One line of the plan: an operator's shape, a step, a batch of requests."""

    op: str

    def title(self) -> str: ...

    def key(self) -> dict: ...


class Bench:
    """One run of one subject. A subject says how a case is measured and which ceilings it is held against.

    Attributes:
        rows: flat dictionaries, complete after every case; each has the machine's facts, so that rows of several files
            may be put together.
        facts: of the machine; ends up in every row.
        notes: what a reader has to know, in sentences.
    """

    subject = ""

    def __init__(self, arguments: argparse.Namespace, device: str, cases: Sequence[Case]):
        self.arguments = arguments
        self.device = device
        self.cases = list(cases)
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.facts = machine.facts(device)
        self.watch = None
        if device == "cpu":
            self.notes.append("CPU figures: they say nothing about the CUDA kernels")

    # What a subject adds.

    def measure(self, case: Case) -> Iterable[dict]:
        """Rows of a case without the facts; a row may have an `error` instead of figures."""
        raise NotImplementedError

    def ceilings(self) -> dict:
        """matmul_tflops, copy_gb_s, read_gb_s as far as the subject is held against them."""
        return {}

    def identity(self, case: Case) -> str:
        """What a row's `case` says: --resume and compare match rows by it."""
        return case.title()

    def weight(self, case: Case) -> float:
        """How long a case takes compared with the others, roughly: for the estimate of the time that is left."""
        return 1.0

    # The run.

    def settings(self) -> dict:
        """What has to be the same for two runs to be comparable."""
        return {name: getattr(self.arguments, name) for name in ("repetitions", "warmup", "seed")}

    def execute(self) -> int:
        """Measures what is not there yet, prints everything.

        Returns:
            0; 1 where a case failed; 130 after Ctrl-C, with what was measured until then.
        """
        if self.arguments.list:
            print("\n".join(case.title() for case in self.cases))
            return 0
        self.resume()
        with quiet():
            interrupted = self.measure_all()
        if not self.rows and self.notes:
            print("\n".join(self.notes), file=sys.stderr)
        self.save()
        form = self.arguments.format
        print(output.render(self.rows, form, self.facts, self.notes), end="")
        if form != "md":
            print("".join(f"vivace bench: {note}\n" for note in self.notes), end="", file=sys.stderr)
        return 130 if interrupted else int(self.failed())

    def failed(self) -> bool:
        """Whether a case failed so that the run counts as failed."""
        return any("error" in row for row in self.rows)

    def resume(self) -> None:
        """Takes over the rows of --resume's file whose cases are asked for and did not fail.

        Raises:
            ValueError: the file is of another machine, of other versions or other settings.
        """
        path = self.arguments.resume
        if path is None:
            return
        if self.arguments.output is None:
            self.arguments.output = path
        if not path.exists():
            return
        rows = output.read(path)
        wanted = {self.identity(case) for case in self.cases}
        settings = self.settings()
        for row in rows:
            different = machine_facts.differences(row, self.facts, strict=True)
            different += [
                f"{name} {row.get(name)}, now {value}" for name, value in settings.items() if row.get(name) != value
            ]
            if different:
                raise ValueError(f"vivace bench {self.subject}: --resume {path} is of another run: {different[0]}")
            if "error" not in row:
                self.rows.append(row)
        kept = {row["case"] for row in self.rows}
        self.cases = [case for case in self.cases if self.identity(case) not in kept]
        if kept & wanted:
            self.notes.append(f"{len(kept & wanted)} of {len(wanted)} cases are from {path.name}, of {rows[0]['date']}")

    def measure_all(self) -> bool:
        """Measures case after case; True where Ctrl-C ended it early."""
        if not self.cases:
            return False
        self.watch = machine.ClockWatch(self.device)
        progress = Progress([self.weight(case) for case in self.cases])
        interrupted, done, before = False, 0, len(self.rows)
        try:
            progress.say("preparing, and measuring what the machine can do at most")
            self.facts |= self.ceilings()
            for done, case in enumerate(self.cases):
                progress.step(done, case.title())
                start = time.monotonic()
                try:
                    measured = [dict(row) for row in self.measure(case)]
                except Exception as error:
                    timing.settle(error)  # fails where the CUDA context is gone
                    measured = [{"error": timing.first_line(error)}]
                seconds = round(time.monotonic() - start, 2)
                self.rows += [self.complete(case, row) | {"case_seconds": seconds} for row in measured]
                self.save()
            done = len(self.cases)
        except KeyboardInterrupt:
            interrupted = True
            self.notes.append(f"interrupted after {done} of {len(self.cases)} cases")
        except RuntimeError as error:  # no case after this one can be measured
            self.notes.append(f"ended after {done} of {len(self.cases)} cases: {timing.first_line(error)}")
            if done < len(self.cases):
                self.rows.append(self.complete(self.cases[done], {"error": timing.first_line(error)}))
        finally:
            progress.clear()
            clocks = self.watch.stop()
        self.facts |= clocks
        for row in self.rows[before:]:
            row |= clocks
        if "throttled" in clocks:
            self.notes.append(f"clocks were held down by {clocks['throttled']}")
        return interrupted

    def complete(self, case: Case, row: dict) -> dict:
        return {"op": case.op, "case": self.identity(case)} | case.key() | row | self.settings() | self.facts

    def note_all(self, notes: Iterable[str]) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def save(self) -> None:
        path: Path | None = self.arguments.output
        if path is not None and self.rows:
            output.write(path, output.render(self.rows, path.suffix.lstrip("."), self.facts, self.notes))


def check(arguments: argparse.Namespace, subject: str) -> None:
    """Refuses values that argparse cannot judge.

    Raises:
        ValueError: one of them.
    """
    if arguments.repetitions < 1 or arguments.warmup < 0:
        raise ValueError(f"vivace bench {subject}: --repetitions must be 1 or more, --warmup 0 or more")
    if arguments.output is not None and arguments.output.suffix.lstrip(".") not in FORMATS:
        raise ValueError(f"vivace bench {subject}: --output {arguments.output} ends in none of .md, .csv, .json")
    if arguments.resume is not None and arguments.resume.suffix.lstrip(".") not in ("csv", "json"):
        raise ValueError(f"vivace bench {subject}: --resume {arguments.resume} ends in none of .csv, .json")


def choose_device(asked: str, subject: str) -> str:
    """ "cuda" or "cpu"; for "auto" the GPU where there is one and the operators were built for it.

    Raises:
        ValueError: "cuda" is asked for and cannot be had.
    """
    import torch

    import vivace.ops

    if asked == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    elif not vivace.ops.build_info().get("cuda"):
        reason = "the operator library was built for the CPU only"
    else:
        return "cuda"
    if asked == "cuda":
        raise ValueError(f"vivace bench {subject}: --device cuda: {reason}")
    return "cpu"


@contextlib.contextmanager
def quiet():
    """No warnings of torch's, in Python or logged: why a backend refuses is in its error already."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
