"""`vivace bench step`: T3's token step for some rows at some length, beside its byte floor and transformers."""

import argparse
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from vivace.bench import figures, machine, replay, run, step_compile, step_peers, step_state, subject, tensors, timing
from vivace.bench.arguments import STEP_PEERS
from vivace.bench.timing import Call
from vivace.t3.config import preset


@dataclass(frozen=True)
class StepCase:
    """``rows`` of ``tokens`` keys each."""

    rows: int
    tokens: int
    dtype: str
    model: str  # a file's name, or "random"
    shape: str
    op: str = "step"

    def title(self) -> str:
        return f"step {self.rows} rows at {self.tokens} tokens, {self.model} {self.shape} {self.dtype}"

    def key(self) -> dict:
        return asdict(self) | {"requests": step_state.requests_of(self.rows)}


def cases(arguments: argparse.Namespace, cpu: bool) -> list[StepCase]:
    """The product of the lists; without lists the published table."""
    rows, tokens = getattr(arguments, "rows", None), getattr(arguments, "tokens", None)
    if rows is None and tokens is None and not cpu:
        pairs = [(r, 300) for r in (1, 2, 40, 128)] + [(r, t) for r in (2, 128) for t in (1000, 3000)]
    else:
        rows = rows or ([1, 2] if cpu else [1, 2, 40, 128])
        pairs = [(r, t) for t in tokens or ([24] if cpu else [300]) for r in rows]
    model, shape = "random", arguments.shape or ("tiny" if cpu else "real")
    if arguments.model is not None:
        model, shape = arguments.model.name, "file"
    dtypes = getattr(arguments, "dtype", ["fp32"] if cpu else ["bf16"])
    return [StepCase(r, t, dtype, model, shape) for dtype in dtypes for r, t in pairs]


def execute(arguments: argparse.Namespace) -> int:
    """Measures the cases that the arguments name and prints them; the exit status is that of `run.Bench.execute`."""
    run.check(arguments, "step")
    device = run.choose_device(arguments.device, "step")
    with torch.no_grad():
        return StepBench(arguments, device, cases(arguments, device == "cpu")).execute()


class StepBench(run.Bench):
    subject = "step"

    def __init__(self, arguments: argparse.Namespace, device: str, wanted: list[StepCase]):
        super().__init__(arguments, device, wanted)
        chosen = arguments.peers
        self.peers = [name for name in (chosen or STEP_PEERS) if name != "none"]
        if device == "cpu" and chosen is None:
            self.peers.remove("compile")  # which takes a minute there
        if self.peers and (reason := step_peers.missing()):
            self.peers = []
            if chosen is not None:
                self.notes.append(f"no peers: {reason}")
        if self.peers:
            import transformers

            self.facts["transformers"] = transformers.__version__
            if os.environ.get("VIVACE_ENABLE"):
                self.notes.append("VIVACE_ENABLE is set: the peers may run on vivace's attention")
        self.weights: tuple[str, step_state.Weights] | None = None
        self.llama = None
        self.buffer = None

    def ceilings(self) -> dict:
        if self.device == "cuda" and "compile" in self.peers:
            step_compile.compile_ahead([self.compile_job(case) for case in self.cases])
        return machine.ceilings(self.device, tensors.DTYPES[self.cases[0].dtype])

    def compile_job(self, case: StepCase) -> tuple[dict, float]:
        """The arguments of `step_compile.compile_one`, and the bytes of its KV cache."""
        model, seed = self.arguments.model, self.arguments.seed
        names = {name: getattr(case, name) for name in ("rows", "tokens", "shape", "dtype")}
        job = names | {"model": model and str(model.resolve()), "device": self.device, "seed": seed}
        config = preset(case.shape if model is None else "real")
        width = 2 * config.num_layers * config.num_kv_heads * config.head_dim * tensors.DTYPES[case.dtype].itemsize
        return job, case.rows * step_state.capacity_of(case.tokens) * width

    def identity(self, case: StepCase) -> str:
        archs = self.arguments.arch
        return case.title() + (f" [{','.join(archs)}]" if archs != ["auto"] else "")

    def load(self, case: StepCase) -> step_state.Weights:
        """The weights of a case; kept for the next one of the same model and dtype."""
        key = f"{case.model} {case.shape} {case.dtype}"
        if self.weights is None or self.weights[0] != key:
            self.weights = self.llama = None
            dtype = tensors.DTYPES[case.dtype]
            if self.arguments.model is not None:
                made = step_state.archive_weights(self.arguments.model, dtype, self.device)
            else:
                made = step_state.random_weights(case.shape, dtype, self.device, self.arguments.seed)
            self.weights = key, made
        return self.weights[1]

    def measure(self, case: StepCase) -> Iterator[dict]:
        """One row for each family of kernels; all of them, the read and the peers take turns."""
        state = step_state.make_state(self.load(case), case.rows, case.tokens, self.arguments.seed)
        archs = list(dict.fromkeys(self.arguments.arch if self.device == "cuda" else ["auto"]))
        own = {}
        for arch in archs:
            with subject.forced(arch):  # the workspace is the family's
                own[arch] = step_state.own_step(state, self.arguments.seed)
        calls = {
            ("vivace", arch): Call(step, lambda arch=arch: subject.forced(arch)) for arch, (step, _) in own.items()
        }
        calls |= {("read", i): call for i, call in enumerate(self.reads(state.step_bytes()))}
        made, errors = self.peer_calls(state)
        calls |= {("peer", name): call for name, call in made.items()}
        samples, failed = take_turns(calls, self.device, self.arguments.repetitions, self.arguments.warmup)
        errors |= {name: why for (kind, name), why in failed.items() if kind == "peer"}
        self.note_all(f"{name} was not measured at {case.rows} rows: {why}" for name, why in errors.items())
        floor = min((statistics.median(s) for (k, _), s in samples.items() if k == "read"), default=None)
        peers = {name: s for (kind, name), s in samples.items() if kind == "peer"}
        if "compile" in peers and self.device == "cuda":
            step_compile.mark(self.compile_job(case)[0])
        for arch in archs:
            row = {"arch": subject.nominal_arch(arch, self.device)}
            if ("vivace", arch) not in samples:
                yield row | {"error": failed["vivace", arch]}
                continue
            with subject.forced(arch):
                row["hash"] = tensors.hash_of(own[arch][1]())
            row["path"] = step_state.path_of(state)
            row |= step_row(state.step_bytes(), samples["vivace", arch], floor, peers, self.facts)
            yield row

    def peer_calls(self, state: step_state.State) -> tuple[dict[str, Call], dict[str, str]]:
        calls, errors = {}, {}
        for name in self.peers:
            try:
                if self.llama is None:
                    self.llama = step_peers.llama(state.weights)
                torch._dynamo.reset()
                calls[name] = step_peers.Peer(self.llama, state).call(name)
            except Exception as error:  # of any version of transformers
                timing.settle(error)
                errors[name] = timing.first_line(error)
        return calls, errors

    def reads(self, size: int) -> list[Call]:
        """Plain reads of ``size`` bytes in the ways that torch has: the quickest is the floor."""
        count = size // 4
        if self.buffer is None or self.buffer.numel() < count:
            self.buffer = None
            self.buffer = torch.ones(count, device=self.device, dtype=torch.float32)
        words = self.buffer[:count]
        calls = [Call(lambda: words.sum()), Call(lambda: words.view(torch.bfloat16).sum()), Call(lambda: words.amax())]
        if self.device == "cuda" and (plain := plain_read(words)) is not None:
            calls.append(Call(plain))
        return calls if self.device == "cuda" else calls[:1]


def plain_read(words: torch.Tensor):
    """A read by a Triton kernel, where Triton is there: closer to the memory's rate than torch's sums."""
    try:
        from vivace.bench import triton_read

        return triton_read.reader(words)
    except Exception:
        return None


def take_turns(calls: dict, device: str, repetitions: int, warmup: int) -> tuple[dict, dict]:
    """timing.take_turns with a graph for what can be captured and Python's own loop for the peers."""

    def make(call: Call, warmup: int):
        if device == "cpu":
            return timing.host_sampler(call, warmup)
        captured = any(call is c for (kind, _), c in calls.items() if kind != "peer")
        return (replay.replay_sampler if captured else replay.call_sampler)(call, warmup)

    return timing.take_turns(calls, make, repetitions, warmup)


def step_row(size: int, ours: list[float], floor: float | None, peers: dict[str, list[float]], facts: dict) -> dict:
    """The figures of one step.

    Args:
        size: bytes of weights, keys and values that it has to read.
        ours: seconds of each sample.
        floor: seconds of a plain read of as many bytes.
        peers: name -> seconds of each sample.

    Returns:
        ms, ms_q1, ms_q3, ms_min, samples, spread_percent, mb, gbps, percent_read; floor_ms and floor_ratio; ms_NAME and
        ratio_NAME of each peer (above 1: vivace is faster); peer, peer_ms and ratio_best of the fastest.
    """
    own = statistics.median(ours)
    row = figures.timed(ours, "ms", 1e3)
    row |= {"mb": round(size / 1e6, 1), "gbps": figures.significant(size / own / 1e9)}
    rates = [facts.get("copy_gb_s", 0), facts.get("read_gb_s", 0)]
    if floor is not None:
        row |= {
            "floor_ms": figures.significant(floor * 1e3),
            "floor_gbps": figures.significant(size / floor / 1e9),
            "floor_ratio": figures.significant(own / floor),
        }
        rates.append(row["floor_gbps"])
    if max(rates):
        row["percent_read"] = figures.significant(100 * row["gbps"] / max(rates), 3)
    medians = {name: statistics.median(samples) for name, samples in peers.items() if samples}
    for name, seconds in medians.items():
        row |= {f"ms_{name}": figures.significant(seconds * 1e3), f"ratio_{name}": figures.significant(seconds / own)}
    if medians:
        best = min(medians, key=medians.get)
        row |= {"peer": best, "peer_ms": row[f"ms_{best}"], "ratio_best": row[f"ratio_{best}"]}
    return row
