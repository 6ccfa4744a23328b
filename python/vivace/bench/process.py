"""Candidates of `vivace bench generate`: each generation runs in a process of its own, whose memory is watched."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vivace.bench import memory

LIMIT_SECONDS = 1800

#: Counters of the engine that a row keeps.
STATS = ("decode_steps", "fused_steps", "not_fused", "graph_replays", "graph_captures", "eager_steps")
STATS += ("prompt_tokens_reused", "weight_bytes", "cache_bytes", "workspace_bytes", "warm_up_seconds")


class Failed(RuntimeError):
    """A candidate's process failed; the text is its last line."""


@dataclass(frozen=True)
class Workload:
    """What every candidate has to do."""

    requests: int
    max_tokens: int
    cfg_weight: float
    text: str
    warmup: int  # tokens of each request before the measured ones
    repeat: int  # measured runs in one process, where it can
    seed: int
    device: str


def start(command: list[str], environment: dict | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the run, which ends this one
    )


def run(start: Callable[[], subprocess.Popen], used, input: str = "") -> tuple[dict, dict]:
    """Runs a candidate that ``start`` starts, or has started; returns the JSON object that it printed last, its memory.

    Raises:
        Failed: it ended with an error. KeyboardInterrupt: the process is ended first.
    """
    memory.wait_until_settled(used)
    watch = memory.Watch(used)
    process = start()
    watch.start(process.pid)
    try:
        out, errors = process.communicate(input, timeout=LIMIT_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        watch.stop()
        raise
    found = watch.stop()
    if process.returncode != 0:
        lines = [line for line in errors.strip().splitlines() if line.strip()]
        raise Failed(lines[-1][:200] if lines else f"ended with status {process.returncode}")
    return json.loads(out.strip().splitlines()[-1]), found


@dataclass(frozen=True)
class Engine:
    """vivace's C++ executable with one model."""

    executable: Path
    model: Path
    tokenizer: Path
    voice: Path
    name: str = "vivace"

    def environment(self) -> dict:
        """The package's own libraries, torch's, and the CUDA libraries that pip put beside it."""
        torch = importlib.util.find_spec("torch")
        folder = Path(torch.origin).parent if torch and torch.origin else None
        paths = [os.environ.get("LD_LIBRARY_PATH", ""), str(self.executable.parent.parent / "lib")]
        if folder is not None:
            paths += [str(folder / "lib"), *nvidia_libraries(folder.parent)]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}

    def options(self) -> frozenset[str]:
        """Options of its `generate`, for those that not every version has."""
        return generate_options(self.executable, self.environment()["LD_LIBRARY_PATH"])

    def run(self, work: Workload, used) -> tuple[list[dict], dict]:
        """The measured runs (seconds, tokens, first_token_seconds, ...) and what is the same in all of them."""
        command = [str(self.executable), "generate", "--model", str(self.model), "--tokenizer", str(self.tokenizer)]
        command += ["--voice", str(self.voice), "--seed", str(work.seed), "--json", "--quiet", "--no-verify"]
        command += ["--lines", "--batch", str(work.requests), "--max-tokens", str(work.max_tokens)]
        command += ["--cfg-weight", str(work.cfg_weight), "--device", work.device]
        known = self.options()
        for flag, value in (("--warmup", work.warmup), ("--repeat", work.repeat)):
            if flag in known and value:
                command += [flag, str(value)]
        if "--ignore-stop" in known:
            command.append("--ignore-stop")
        answer, found = run(lambda: start(command, self.environment()), used, "\n".join([work.text] * work.requests))
        return engine_runs(answer), found | engine_facts(answer)


def engine_runs(answer: dict) -> list[dict]:
    """One dictionary for each measured run of `vivace generate --json`: seconds, tokens, first_token_seconds."""
    runs = answer.get("runs")
    if runs:
        return [
            {
                "seconds": r["seconds"],
                "tokens": r["tokens"],
                "first_token_seconds": sorted(r["time_to_first_token"])[len(r["time_to_first_token"]) // 2],
            }
            for r in runs
        ]
    results = answer["results"]
    first = sorted(r["time_to_first_token"] for r in results)
    tokens = sum(len(r["tokens"]) for r in results)
    return [{"seconds": answer["seconds"], "tokens": tokens, "first_token_seconds": first[len(first) // 2]}]


def engine_facts(answer: dict) -> dict:
    """What the process says about itself, and the tokens, for their hash."""
    stats, results = answer["stats"], answer["results"]
    found = {"prompt_tokens": results[0]["prompt_tokens"], "dtype": stats["dtype"]}
    if stats.get("decode_steps"):
        found["ms_per_step"] = 1e3 * stats["decode_seconds"] / stats["decode_steps"]
    for name in STATS:
        if name in stats:
            found[name] = stats[name]
    if stats.get("device", "").startswith("cuda"):
        found["allocator_peak_gib"] = round(stats["peak_memory_bytes"] / memory.GIB, 3)
    return found | {"load_seconds": stats["load_seconds"], "output": [r["tokens"] for r in results]}


class Chatterbox:
    """Chatterbox's own T3 with random weights, in one of its forms; one guided request."""

    def __init__(self, form: str, shape: str, text_tokens: int):
        self.form = form
        self.shape = shape
        self.text_tokens = text_tokens
        self.started: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return f"Chatterbox {self.form}"

    def start(self) -> None:
        """Starts the process of the next run: it imports what it needs and leaves the GPU alone until then."""
        command = [sys.executable, "-W", "ignore", "-m", "vivace.bench.chatterbox"]
        self.started = start(command, python_environment())

    def wait_until_ready(self) -> None:
        """Until it has done its imports, or has ended."""
        self.started.stdout.readline()

    def close(self) -> None:
        """Ends a process that was started and not used."""
        if self.started is not None:
            self.started.kill()
            self.started.communicate()
            self.started = None

    def take(self) -> subprocess.Popen:
        if self.started is None:
            self.start()
        process, self.started = self.started, None
        return process

    def run(self, work: Workload, used) -> tuple[list[dict], dict]:
        """As `Engine.run`."""
        job = {
            "form": self.form,
            "shape": self.shape,
            "text_tokens": self.text_tokens,
            "max_tokens": work.max_tokens,
            "cfg_weight": work.cfg_weight,
            "warmup": min(work.warmup, work.max_tokens),
            "repeat": work.repeat,
            "seed": work.seed,
            "device": work.device,
        }
        answer, found = run(self.take, used, json.dumps(job))
        return answer.pop("runs"), found | answer


def python_environment() -> dict:
    """Of a Python process that measures a peer: it finds this package, and does not run on vivace."""
    package = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    environment.pop("VIVACE_ENABLE", None)
    return environment


@functools.cache
def generate_options(executable: Path, libraries: str) -> frozenset[str]:
    help = subprocess.run(
        [str(executable), "generate", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    ).stdout
    return frozenset(word.rstrip(",") for word in help.replace(",", " ").split() if word.startswith("--"))


@functools.cache
def nvidia_libraries(packages: Path) -> tuple[str, ...]:
    return tuple(sorted({str(path.parent) for path in (packages / "nvidia").glob("**/*.so*")}))
