"""Timing of calls: CUDA events, CUDA graphs, the host's clock; candidates take turns."""

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

SAMPLE_SECONDS = 1e-3  # a sample repeats a call until it lasts about this long
MOST_CALLS = 20  # in a sample, and in a CUDA graph
DISPATCHES = 100  # calls in a sample of the host's time: few enough for the device's queue
SPIN_HZ = 2e9  # about a GPU's clock


@dataclass(frozen=True)
class Call:
    """A function of no arguments, and what has to be in force while it runs: entered outside the timed part.

    ``count``: how many calls the function makes, for those that loop in C++.
    """

    function: Callable[[], object]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    count: int = 1

    def __call__(self):
        with self.context():
            return self.function()


#: Takes one sample: seconds of one call.
Sampler = Callable[[], float]


def event_sampler(call: Call, warmup: int) -> Sampler:
    """Seconds of a call between two CUDA events around up to MOST_CALLS of them.

    The GPU spins before the first event for as long as the host needs to enqueue them, so that the host's time is not
    in the sample.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(calls, spin_seconds):
        with call.context():
            if spin_seconds > 0:
                torch.cuda._sleep(int(spin_seconds * SPIN_HZ))
            host = time.perf_counter()
            start.record()
            for _ in range(calls):
                call.function()
            end.record()
            host = time.perf_counter() - host
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls, host / calls

    sample(max(warmup, 1), 0.0)
    seconds, host = sample(1, 50e-6)
    calls = repeats(seconds)
    spin = min(1.5 * host * calls + 20e-6, 20e-3)
    return lambda: sample(calls, spin)[0]


def graph_sampler(call: Call, warmup: int) -> Sampler:
    """Seconds of a call inside a CUDA graph of MOST_CALLS of them."""
    graph = capture(call, warmup, MOST_CALLS)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / MOST_CALLS

    sample()
    sample()
    return sample


def capture(call: Call, warmup: int, count: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``count`` calls, after at least one on another stream."""
    # The outer stream context: a capture that fails leaves its own stream as the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), call.context():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(warmup, 1)):
                call.function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call.function()
    return graph


def host_sampler(call: Call, warmup: int) -> Sampler:
    """Seconds of a call by the host's clock: what a CPU operator takes."""

    def sample(calls):
        with call.context():
            start = time.perf_counter()
            for _ in range(calls):
                call.function()
            return (time.perf_counter() - start) / calls

    sample(max(warmup, 1))
    calls = repeats(sample(1))
    return lambda: sample(calls)


def dispatch_sampler(call: Call, warmup: int) -> Sampler:
    """Seconds that the host needs to enqueue a call; the device's work is waited for outside of the timed part."""
    calls = max(1, DISPATCHES // call.count)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def sample():
        wait()
        with call.context():
            start = time.perf_counter()
            for _ in range(calls):
                call.function()
            return (time.perf_counter() - start) / (calls * call.count)

    for _ in range(max(warmup, 1)):
        sample()
    return sample


def repeats(seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def take_turns(
    calls: Mapping,
    make_sampler: Callable[[Call, int], Sampler],
    repetitions: int,
    warmup: int,
) -> tuple[dict, dict]:
    """Samples all calls in turn, each round starting with the next one, so that a drifting clock meets all alike.

    Returns:
        name -> ``repetitions`` samples in seconds, and name -> why it was not measured.
    """
    samplers, samples, errors = {}, {}, {}
    for name, call in calls.items():
        try:
            samplers[name] = make_sampler(call, warmup)
            samples[name] = []
        except Exception as error:  # peers fail in many ways; the cell goes on with the others
            settle(error)
            errors[name] = first_line(error)
    gc.collect()
    for round_number in range(repetitions):
        names = list(samplers)
        for i in range(len(names)):
            name = names[(i + round_number) % len(names)]
            try:
                samples[name].append(samplers[name]())
            except Exception as error:
                settle(error)
                errors[name] = first_line(error)
                del samplers[name]
                samples.pop(name)
    return samples, errors


def settle(error: Exception) -> None:
    """Frees what the failed call left; an error that ended the CUDA context comes up again here."""
    error.__traceback__ = None  # its frames hold tensors
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
