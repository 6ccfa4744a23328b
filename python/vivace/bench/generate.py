"""`vivace bench generate`: whole requests on the engine, in batches, beside Chatterbox's own T3."""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vivace import plan
from vivace.bench import chatterbox, figures, machine, memory, process, run, tensors
from vivace.bench.arguments import GENERATE_PEERS
from vivace.bench.models import Model, prepare

#: Of plan.TEXT_TOKENS tokens in the demo's tokenizer, as many as Chatterbox's own T3 gets here.
TEXT = (
    "The lighthouse keeper had counted every ship that passed since the spring, and tonight, as the fog rolled in over "
    "the harbour and the bells of the town began to ring, he counted one more."
)
TOKENS_A_SECOND = 25  # of speech
BATCHES = (1, 2, 5, 10, 20, 64)


@dataclass(frozen=True)
class GenerateCase:
    """``requests`` at once of ``max_tokens`` each, by every model; of one request by the peers too."""

    requests: int
    max_tokens: int
    cfg_weight: float
    shape: str
    op: str = "generate"

    def title(self) -> str:
        return f"generate {self.requests} x {self.max_tokens} tokens, cfg {self.cfg_weight:g}, {self.shape}"

    def key(self) -> dict:
        return asdict(self)


def execute(arguments: argparse.Namespace) -> int:
    """Measures the batches that the arguments name and prints them; the status is that of `run.Bench.execute`."""
    from vivace import cli

    run.check(arguments, "generate")
    executable = cli.find_executable()
    if executable is None:
        raise ValueError(
            "vivace bench generate: the C++ executable is missing: build it with pip install . or CMake, "
            "or set VIVACE_EXECUTABLE to it"
        )
    device = run.choose_device(arguments.device, "generate")
    cpu = device == "cpu"
    shape = arguments.shape or ("tiny" if cpu else "real")
    tokens = arguments.max_tokens or (32 if cpu else 1000)
    if tokens < 2:
        raise ValueError("vivace bench generate: --max-tokens must be 2 or more")
    described = "files" if arguments.models else shape
    cases = [GenerateCase(n, tokens, arguments.cfg_weight, described) for n in batches(arguments, cpu, tokens)]
    with tempfile.TemporaryDirectory(prefix="vivace-bench-") as folder:
        bench = GenerateBench(arguments, device, cases, shape, Path(executable).resolve(), Path(folder))
        try:
            return bench.execute()
        finally:
            bench.close()


def batches(arguments: argparse.Namespace, cpu: bool, tokens: int) -> list[int]:
    """The numbers of requests: those of --batch, and the most that `vivace plan` puts into each card of --vram.

    Raises:
        ValueError: a card holds not even one request; --vram without a GPU.
    """
    if not arguments.vram:
        return list(dict.fromkeys(arguments.batch or ((1, 2) if cpu else BATCHES)))
    if cpu:
        raise ValueError("vivace bench generate: --vram plans the memory of a GPU, this run has none")
    shape, options = plan.shape_of(arguments.dtype or "bf16"), {"guided": arguments.cfg_weight > 0}
    found = list(arguments.batch or ())
    for size in arguments.vram:
        fitting = plan.largest_batch((size - plan.RESERVE) * plan.GIB, shape, tokens, **options)
        if fitting is None:
            raise ValueError(f"vivace bench generate: --vram {size:g}: not even one request of {tokens} tokens fits")
        found.append(fitting.requests)
    return list(dict.fromkeys(found))


class GenerateBench(run.Bench):
    subject = "generate"

    def __init__(self, arguments, device: str, wanted: list[GenerateCase], shape: str, executable: Path, folder: Path):
        super().__init__(arguments, device, wanted)
        self.shape = shape
        self.executable = executable
        self.folder = folder
        self.used = memory.gpu_memory(device)
        if device == "cuda" and self.used is None:
            self.notes.append("NVML does not answer: no memory of the whole process")
        self.models: list[Model] = []
        self.unusable: dict[str, str] = {}
        chosen = arguments.peers
        forms = [name for name in (chosen or GENERATE_PEERS) if name != "none"]
        if device == "cpu" and chosen is None:
            forms.remove("compiled")  # which takes a minute there
        if forms and (reason := chatterbox.available()):
            forms = []
            if chosen is not None:
                self.notes.append(f"no peers: {reason}")
        self.peers = [process.Chatterbox(form, shape, plan.TEXT_TOKENS) for form in forms]

    def failed(self) -> bool:
        """A model that cannot be measured leaves the others alone; a run without any figures has failed."""
        own = [row for row in self.rows if row.get("implementation", "vivace") == "vivace"]
        return any(all("error" in row for row in own if row["case"] == self.identity(case)) for case in self.cases)

    def settings(self) -> dict:
        text = self.arguments.text or TEXT
        return super().settings() | {"text": tensors.text_hash(text), "export_dtype": self.dtype()}

    def dtype(self) -> str:
        """That checkpoints are exported in, and the random model is made in."""
        return self.arguments.dtype or ("fp32" if self.device == "cpu" else "bf16")

    def identity(self, case: GenerateCase) -> str:
        names = ", ".join(Path(name).name for name in self.arguments.models) or "random"
        return f"{case.title()}: {names}"

    def ceilings(self) -> dict:
        """Measured first, so that its memory is back before a process' is watched; models are prepared besides."""
        import torch

        found = machine.ceilings(self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        peers = list(dict.fromkeys(peer for case in self.cases for peer in self.peers_of(case)))
        for peer in peers:  # side by side, so that their imports are not waited for one by one
            peer.start()
        files = {"tokenizer": self.arguments.tokenizer, "voice": self.arguments.voice}
        self.models, failed = prepare(
            self.arguments.models, self.folder, self.shape, self.dtype(), self.arguments.seed, files
        )
        self.unusable = failed
        self.note_all(f"{name} is not measured: {reason}" for name, reason in failed.items())
        for peer in peers:
            peer.wait_until_ready()
        return found

    def close(self) -> None:
        """Ends the processes that are not needed any more."""
        for peer in self.peers:
            peer.close()

    def peers_of(self, case: GenerateCase) -> list[process.Chatterbox]:
        """The peers that take the case: they know one guided request at once."""
        return self.peers if case.requests == 1 and case.cfg_weight > 0 else []

    def candidates(self, case: GenerateCase) -> list:
        found = [process.Engine(self.executable, model.archive, model.tokenizer, model.voice) for model in self.models]
        return found + self.peers_of(case)

    def weight(self, case: GenerateCase) -> float:
        """A batch of 64 takes three times as long as one request; a peer, with its imports, as long as four."""
        models = max(1, len(self.arguments.models))
        return models * (1 + case.requests / 32) + 4 * len(self.peers_of(case))

    def work(self, case: GenerateCase, candidate, alone: bool) -> process.Workload:
        peer = isinstance(candidate, process.Chatterbox)
        tokens = case.max_tokens
        if peer:
            tokens = min(tokens, self.arguments.peer_tokens or (8 if self.device == "cpu" else 200))
        return process.Workload(
            case.requests,
            tokens,
            case.cfg_weight,
            self.arguments.text or TEXT,
            self.arguments.warmup,
            self.arguments.repetitions if alone else 1,
            self.arguments.seed,
            self.device,
        )

    def turns(self, candidate, repeats: bool) -> int:
        """How many processes of a candidate there are."""
        if isinstance(candidate, process.Chatterbox) and self.arguments.peer_repetitions is not None:
            return min(self.arguments.peer_repetitions, self.arguments.repetitions)
        return 1 if repeats else self.arguments.repetitions

    def measure(self, case: GenerateCase) -> Iterator[dict]:
        """One row for each model and peer; where there are several, their processes take turns."""
        candidates = self.candidates(case)
        measured: list[list[tuple[list[dict], dict]]] = [[] for _ in candidates]
        errors: dict[int, str] = {}
        alone = len(candidates) == 1
        repeats = {
            i: alone and isinstance(c, process.Engine) and "--repeat" in c.options() for i, c in enumerate(candidates)
        }
        for turn in range(self.arguments.repetitions):
            for i in range(len(candidates)):
                i = (i + turn) % len(candidates)
                if i in errors or turn >= self.turns(candidates[i], repeats[i]):
                    continue
                work = self.work(case, candidates[i], repeats[i])
                try:
                    measured[i].append(candidates[i].run(work, self.used))
                except (process.Failed, ValueError, KeyError, OSError) as error:
                    errors[i] = str(error) or type(error).__name__
        reference = None
        for i, candidate in enumerate(candidates):
            peer = isinstance(candidate, process.Chatterbox)
            model = {"model": "random" if peer else self.models[i].name}
            row = {"implementation": candidate.name} | model
            if i in errors:
                if peer:
                    self.note_all([f"{candidate.name} was not measured: {errors[i]}"])
                else:
                    yield row | {"error": errors[i]}
                continue
            tokens = self.work(case, candidate, False).max_tokens
            row |= generate_row(measured[i], case.requests, tokens)
            if not peer:
                row |= self.planned(case, row)
                if row.get("not_fused") and self.device == "cuda":
                    self.note_all([f"steps went layer by layer: {row['not_fused']}"])
                if reference is None:
                    reference = row
            elif reference is not None:
                row["ratio_vivace"] = figures.significant(reference["tokens_per_s"] / row["tokens_per_s"])
            yield row
        for name, reason in self.unusable.items():
            yield {"implementation": "vivace", "model": name, "error": reason}

    def planned(self, case: GenerateCase, row: dict) -> dict:
        """What follows from the model's shape: the positions that a row of the cache has, the memory that the process
        should stay within, and what `vivace plan` says of it, beside what was measured.
        """
        manifest = next(model.manifest for model in self.models if model.name == row["model"])
        width = plan.model_shape(manifest).kv_bytes_per_token
        found = {"kv_bytes_per_token": width}
        if "cache_bytes" in row:
            found["positions"] = row["cache_bytes"] // (width * plan.rows_of(case.requests, case.cfg_weight > 0))
        if row.get("vram_peak_gib") and "weight_bytes" in row:
            found["plan_gib"] = round(plan.predict_row(case.key() | row | found) / memory.GIB, 3)
            if "cache_bytes" in row:
                found["vram_aim_gib"] = round(plan.aim(row["weight_bytes"], row["cache_bytes"]) / memory.GIB, 3)
            found["plan_error_percent"] = figures.significant(100 * (found["plan_gib"] / row["vram_peak_gib"] - 1), 3)
        return found


def generate_row(measured: list[tuple[list[dict], dict]], requests: int, max_tokens: int) -> dict:
    """The figures of one candidate, over the runs of all its processes.

    Returns:
        tokens, seconds (s from submission to the end, of all requests) and what `figures.timed` says with it,
        tokens_per_s, rtf (seconds of speech a second), first_token_ms, ms_per_step, memory, and what
        the process said.
    """
    runs = [one for some, _ in measured for one in some]
    facts = measured[-1][1]
    tokens = statistics.median(one["tokens"] for one in runs)
    seconds = statistics.median(one["seconds"] for one in runs)
    row = {"max_tokens": max_tokens, "tokens": int(tokens), "short": tokens < requests * max_tokens}
    row |= figures.timed([one["seconds"] for one in runs], "seconds")
    row |= {
        "tokens_per_s": figures.significant(tokens / seconds, 5),
        "rtf": figures.significant(tokens / TOKENS_A_SECOND / seconds, 4),
        "first_token_ms": figures.significant(1e3 * statistics.median(one["first_token_seconds"] for one in runs)),
    }
    per_step = [f["ms_per_step"] for _, f in measured if "ms_per_step" in f]
    row["ms_per_step"] = figures.significant(statistics.median(per_step) if per_step else 1e3 * seconds / tokens)
    for name in ("vram_peak_gib", "vram_steady_gib", "rss_peak_gib"):
        values = [f[name] for _, f in measured if name in f]
        if values:
            row[name] = max(values) if "peak" in name else statistics.median(values)
    skip = {"output", "ms_per_step", "vram_peak_gib", "vram_steady_gib", "rss_peak_gib"}
    row |= {name: value for name, value in facts.items() if name not in skip}
    if "output" in facts:
        row["hash"] = tensors.text_hash(facts["output"])
    return row
