"""torch.compile of several cases' peers in processes side by side, before any is measured: its caches then have them.

One after the other takes a minute for each number of rows. A process that fails is no loss: its case compiles then.
`python -m vivace.bench.step_compile '{...}'` compiles one.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vivace.bench.process import python_environment

CORES_EACH = 3  # most of the time one is busy; kernels are compiled by more
BYTES_BESIDES = 4e9  # of a process: CUDA context, weights, workspaces
LIMIT_SECONDS = 300


def compile_ahead(jobs: Sequence[tuple[dict, float]]) -> None:
    """Compiles the jobs that the caches do not have, and returns when all have ended.

    A single one is left to its case, and so are all where the machine has no room for two at once.

    Args:
        jobs: the arguments of `compile_one`, and the bytes of the case's KV cache, which a process holds twice.
    """
    cores, free = os.cpu_count() or 1, torch.cuda.mem_get_info()[0]
    waiting = [(job, BYTES_BESIDES + 2 * cache) for job, cache in jobs if not marker(job).exists()]
    waiting = sorted((item for item in waiting if item[1] < free), key=lambda item: -item[1])
    if len(waiting) < 2 or cores < 2 * CORES_EACH:
        return
    environment = python_environment()
    running: list[tuple[subprocess.Popen, float]] = []
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while (waiting or running) and time.monotonic() < deadline:
            running = [(process, size) for process, size in running if process.poll() is None]
            chosen = next_job(waiting, [size for _, size in running], cores, free)
            if chosen is None:
                time.sleep(0.1)
                continue
            job, size = waiting.pop(chosen)
            running.append((start(job, environment), size))
    finally:
        for process, _ in running:
            process.kill()
            process.wait()


def next_job(waiting: Sequence[tuple[dict, float]], running: Sequence[float], cores: int, free: float) -> int | None:
    """Index of the first job that cores and memory have room for beside those that run; None: none."""
    if len(running) >= max(1, cores // CORES_EACH):
        return None
    return next((i for i, (_, size) in enumerate(waiting) if size + sum(running) <= free), None)


def marker(job: dict) -> Path:
    """A file in torch's cache that says that a job was compiled by these versions; `mark` makes it."""
    import transformers
    from torch._inductor.codecache import cache_dir

    source = Path(__file__).with_name("step_peers.py").read_text()
    told = [job, torch.__version__, transformers.__version__, torch.cuda.is_available(), source]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir()) / "vivace-step" / digest


def mark(job: dict) -> None:
    path = marker(job)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def start(job: dict, environment: dict) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "vivace.bench.step_compile", json.dumps(job)]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run; it ends this one above
    )


@torch.no_grad()
def compile_one(rows: int, tokens: int, shape: str, dtype: str, model: str | None, device: str, seed: int) -> None:
    """Compiles the peer of one case by calling it."""
    from vivace.bench import step_peers, step_state, tensors

    kind = tensors.DTYPES[dtype]
    if model is not None:
        weights = step_state.archive_weights(Path(model), kind, device)
    else:
        weights = step_state.random_weights(shape, kind, device, seed)
    state = step_state.make_state(weights, rows, tokens, seed)
    step_peers.Peer(step_peers.llama(weights), state).call("compile")()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    compile_one(**asked)
    mark(asked)
