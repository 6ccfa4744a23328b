"""Samplers of whole token steps: a captured step replayed again and again, or a Python function called so."""

import gc
import time

import torch

from vivace.bench import timing
from vivace.bench.timing import Call, Sampler

SECONDS = 20e-3  # a sample lasts about this long
MOST = 40  # steps in it


def replay_sampler(call: Call, warmup: int) -> Sampler:
    """Seconds of one step: replays of a CUDA graph of one call, back to back, between two events."""
    gc.collect()  # what was measured before holds memory in cycles, which a capture must not free
    graph = timing.capture(call, warmup, 1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(steps):
        start.record()
        for _ in range(steps):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / steps

    sample(2)
    steps = repeats(sample(4))
    return lambda: sample(steps)


def call_sampler(call: Call, warmup: int) -> Sampler:
    """Seconds of one step as a Python loop gets it: calls back to back, the device waited for once at the end."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def sample(steps):
        with call.context():
            wait()
            start = time.perf_counter()
            for _ in range(steps):
                call.function()
            wait()
            return (time.perf_counter() - start) / steps

    sample(max(warmup, 1))
    steps = repeats(sample(2))
    return lambda: sample(steps)


def repeats(seconds: float) -> int:
    return max(1, min(MOST, round(SECONDS / max(seconds, 1e-9))))
