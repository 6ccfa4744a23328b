"""`vivace bench attention`: one operator's cells, and what is said about them."""

import argparse
from collections.abc import Iterator

import torch

from vivace.bench import cells, figures, machine, presets, run, tensors, timing
from vivace.bench import peers as peer_libraries
from vivace.bench import subject as subject_calls


def execute(arguments: argparse.Namespace) -> int:
    """Measures the cells that the arguments name and prints them; the exit status is that of `run.Bench.execute`."""
    run.check(arguments, "attention")
    device = run.choose_device(arguments.device, "attention")
    with torch.no_grad():
        return AttentionBench(arguments, device, presets.cells(arguments, device == "cpu")).execute()


class AttentionBench(run.Bench):
    """Forward, packed and decoding attention, and the cost of a call."""

    subject = "attention"

    def __init__(self, arguments: argparse.Namespace, device: str, wanted: list[cells.Cell]):
        super().__init__(arguments, device, wanted)
        self.peers, missing = peer_libraries.installed(device, arguments.peers)
        self.note_all(f"{name} is not measured: {reason}" for name, reason in missing.items())
        if device == "cpu" and arguments.arch != ["auto"]:
            self.notes.append("--arch chooses among CUDA kernels: it changed nothing")

    def ceilings(self) -> dict:
        return machine.ceilings(self.device, tensors.DTYPES[self.cases[0].dtype])

    def identity(self, case: cells.Cell) -> str:
        archs = self.arguments.arch
        return case.title() + (f" [{','.join(archs)}]" if archs != ["auto"] else "")

    def measure(self, cell: cells.Cell) -> Iterator[dict]:
        for row in self.overhead(cell) if cell.op == "overhead" else self.compare(cell):
            # The bars are Hopper's.
            yield row | ({"bar": cell.bar} if cell.bar is not None and row["arch"] == "sm90a" else {})

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
                row["kv_mb"] = figures.significant(work / 1e6)
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
        arch = "cpu" if self.device == "cpu" else "auto"
        for language, calls in subject_calls.overhead_calls(cell, self.device).items():
            samples, errors = timing.take_turns(
                calls, timing.dispatch_sampler, self.arguments.repetitions, self.arguments.warmup
            )
            peers = {"sdpa": ("bhsd", samples.pop(subject_calls.SDPA))} if subject_calls.SDPA in samples else {}
            key = {"arch": arch, "from": language}
            for name, times in samples.items():
                yield {"call": name} | key | figures.row(cell, 0, times, peers, self.facts)
            for name in errors.keys() - {subject_calls.SDPA}:
                yield {"call": name} | key | {"error": errors[name]}

    def note_all(self, notes) -> None:
        """Adds those that were not said yet; one peer's refusal of an operator is said once."""
        for note in notes:
            key = note.partition(" such as ")[0]
            if not any(old.partition(" such as ")[0] == key for old in self.notes):
                self.notes.append(note)
