"""`vivace bench attention`: the loop over cells, and what is said about them."""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

import torch

from vivace.bench import cells, figures, machine, output, presets, tensors, timing
from vivace.bench import peers as peer_libraries
from vivace.bench import subject as subject_calls
from vivace.bench.arguments import FORMATS
from vivace.bench.progress import Progress


def run(arguments: argparse.Namespace) -> int:
    """Measures the cells that the arguments name and prints them.

    Returns:
        0; 1 where a cell of vivace failed; 130 after Ctrl-C, with what was measured until then.
    """
    if arguments.repetitions < 1 or arguments.warmup < 0:
        raise ValueError("vivace bench attention: --repetitions must be 1 or more, --warmup 0 or more")
    if arguments.output is not None and arguments.output.suffix.lstrip(".") not in FORMATS:
        raise ValueError(f"vivace bench attention: --output {arguments.output} ends in none of .md, .csv, .json")
    device = choose_device(arguments.device)
    wanted = presets.cells(arguments, device == "cpu")
    if arguments.list:
        print("\n".join(cell.title() for cell in wanted))
        return 0
    bench = AttentionBench(arguments, device, wanted)
    with torch.no_grad(), quiet():
        interrupted = bench.measure_all()
    if not bench.rows and bench.notes:
        print("\n".join(bench.notes), file=sys.stderr)
    bench.save()
    print(output.render(bench.rows, arguments.format, bench.facts, bench.notes), end="")
    if arguments.format != "md":
        print("".join(f"vivace bench: {note}\n" for note in bench.notes), end="", file=sys.stderr)
    return 130 if interrupted else int(any("error" in row for row in bench.rows))


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


def choose_device(asked: str) -> str:
    """ "cuda" or "cpu"; for "auto" the GPU where there is one and the operators were built for it."""
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
        raise ValueError(f"vivace bench attention: --device cuda: {reason}")
    return "cpu"


class AttentionBench:
    """One run. rows are complete after every cell; facts and notes are for people."""

    def __init__(self, arguments: argparse.Namespace, device: str, wanted: list[cells.Cell]):
        self.arguments = arguments
        self.device = device
        self.cells = wanted
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.facts = machine.facts(device)
        self.peers, missing = peer_libraries.installed(device, arguments.peers)
        self.note_all(f"{name} is not measured: {reason}" for name, reason in missing.items())
        if device == "cpu":
            self.notes.append("CPU figures: they say nothing about the CUDA kernels")
            if arguments.arch != ["auto"]:
                self.notes.append("--arch chooses among CUDA kernels: it changed nothing")

    def measure_all(self) -> bool:
        """Measures cell after cell; True where Ctrl-C ended it early."""
        watch = machine.ClockWatch(self.device)
        progress = Progress(len(self.cells))
        interrupted, done = False, 0
        try:
            self.facts |= machine.ceilings(self.device, tensors.DTYPES[self.cells[0].dtype])
            for done, cell in enumerate(self.cells):
                progress.step(done, cell.title())
                try:
                    self.rows += self.measure(cell)
                except Exception as error:
                    timing.settle(error)  # fails where the CUDA context is gone
                    self.rows.append(cell.key() | {"error": timing.first_line(error)} | self.facts)
                self.save()
            done = len(self.cells)
        except KeyboardInterrupt:
            interrupted = True
            self.notes.append(f"interrupted after {done} of {len(self.cells)} cells")
        except RuntimeError as error:  # no cell after this one can be measured
            self.notes.append(f"ended after {done} of {len(self.cells)} cells: {timing.first_line(error)}")
            if done < len(self.cells):
                self.rows.append(self.cells[done].key() | self.facts | {"error": timing.first_line(error)})
        finally:
            progress.clear()
            clocks = watch.stop()
        self.facts |= clocks
        for row in self.rows:
            row |= clocks
        if "throttled" in clocks:
            self.notes.append(f"clocks were held down by {clocks['throttled']}")
        return interrupted

    def measure(self, cell: cells.Cell) -> list[dict]:
        common = {
            "repetitions": self.arguments.repetitions,
            "warmup": self.arguments.warmup,
            "seed": self.arguments.seed,
        }
        measured = self.overhead(cell) if cell.op == "overhead" else self.compare(cell)
        rows = [cell.key() | row | common | self.facts for row in measured]
        for row in rows:
            if row["arch"] != "sm90a":  # the bars are Hopper's
                row.pop("bar", None)
        return rows

    def compare(self, cell: cells.Cell) -> Iterator[dict]:
        """One row for each kernel family asked for; all of them and the peers take turns."""
        inputs = tensors.make_inputs(cell, self.device, self.arguments.seed)
        archs = dict.fromkeys(self.arguments.arch if self.device == "cuda" else ["auto"])
        if cell.op == "decode":  # has a kernel of its own, whichever family is asked for, unless it is the generic one
            archs = [arch for arch in archs if arch in ("auto", "generic")] or ["auto"]
        own = {arch: subject_calls.own_call(cell, inputs, arch) for arch in archs}
        ways, reasons = self.ways(cell, inputs)
        calls = {("vivace", arch): call for arch, call in own.items()}
        calls |= {name: way.call for name, way in ways.items()}
        samples, errors = timing.take_turns(
            calls, self.sampler(cell), self.arguments.repetitions, self.arguments.warmup
        )
        times = {name: samples[name] for name in ways if name in samples}
        best = figures.better_layouts(times)
        reasons |= {
            name: errors[name, layout] for name, layout in ways if (name, layout) in errors and name not in best
        }
        self.note_all(
            f"{name} does not take {cell.op} cells such as {cell.title()}: {why}" for name, why in reasons.items()
        )
        reference = next(((name, ways[name, best[name][0]]) for name in best), None)
        work = cells.kv_bytes(cell) if cell.op == "decode" else cells.flop(cell, inputs.lengths)
        for arch, call in own.items():
            row = {"arch": subject_calls.nominal_arch(arch, self.device)}
            if cell.op == "decode":
                row["kv_mb"] = round(work / 1e6, 1)
                row["in_l2"] = self.device == "cuda" and work < torch.cuda.get_device_properties(0).L2_cache_size
            if ("vivace", arch) not in samples:
                yield row | {"error": errors["vivace", arch]}
                continue
            out = call()[0]
            if cell.op != "decode":  # an architecture's name may fall back to an older one's kernel
                row["arch"] = subject_calls.last_family()
            row |= figures.row(cell, work, samples["vivace", arch], best, self.facts)
            row["hash"] = tensors.hash_of(out)
            if reference is not None:
                row["max_difference"] = self.difference(cell, out, *reference)
            yield row

    def difference(self, cell: cells.Cell, out: torch.Tensor, name: str, way: peer_libraries.Way) -> float | None:
        """The largest absolute difference between vivace's output and a peer's."""
        try:
            value = tensors.difference(out, way.unpack(peer_libraries.first(way.call())))
        except Exception as error:
            timing.settle(error)
            self.note_all([f"{name}'s output was not compared: {timing.first_line(error)}"])
            return None
        if not value <= tensors.LARGEST_DIFFERENCE[cell.dtype]:
            self.notes.append(f"the output differs from {name}'s by {value:.3g} in {cell.title()}")
        return figures.finite(value)

    def ways(self, cell: cells.Cell, inputs: tensors.Inputs) -> tuple[dict, dict]:
        """(peer, layout) -> its way to do the cell; peer -> why it has none."""
        ways, reasons = {}, {}
        for name, peer in self.peers.items():
            try:
                ways |= {(name, layout): way for layout, way in peer(cell, inputs).items()}
            except Exception as error:
                timing.settle(error)
                reasons[name] = timing.first_line(error)
        return ways, reasons

    def sampler(self, cell: cells.Cell):
        if self.device == "cpu":
            return timing.host_sampler
        return timing.graph_sampler if cell.op == "decode" else timing.event_sampler

    def overhead(self, cell: cells.Cell) -> Iterator[dict]:
        calls, sdpa = subject_calls.overhead_calls(cell, self.device)
        samples, errors = timing.take_turns(
            calls, timing.dispatch_sampler, self.arguments.repetitions, self.arguments.warmup
        )
        peers = {"sdpa": ("bhsd", samples.pop(sdpa))} if sdpa in samples else {}
        arch = "cpu" if self.device == "cpu" else "auto"
        for name, times in samples.items():
            yield {"call": name, "arch": arch} | figures.row(cell, 0, times, peers, self.facts)
        for name in errors.keys() - {sdpa}:
            yield {"call": name, "arch": arch, "error": errors[name]}

    def note_all(self, notes) -> None:
        """Adds those that were not said yet; one peer's refusal of an operator is said once."""
        for note in notes:
            key = note.partition(" such as ")[0]
            if not any(old.partition(" such as ")[0] == key for old in self.notes):
                self.notes.append(note)

    def save(self) -> None:
        """Writes --output as far as the run is."""
        path = self.arguments.output
        if path is not None and self.rows:
            output.write(path, output.render(self.rows, path.suffix[1:], self.facts, self.notes))
