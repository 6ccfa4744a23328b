"""How samples are taken. CUDA's events, graphs and nvidia-smi are imitated here; test_cuda.py runs the real ones."""

import contextlib
import io

import pytest
import torch

from vivace.bench import machine, progress, replay, timing
from vivace.bench.timing import Call


def test_candidates_take_turns_and_each_goes_first():
    order = []

    def make_sampler(call, warmup):
        assert warmup == 2
        return lambda: order.append(call.function()) or float(len(order))

    calls = {name: Call(lambda name=name: name) for name in "abc"}
    samples, errors = timing.take_turns(calls, make_sampler, 3, 2)
    assert "".join(order) == "abcbcacab" and not errors
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_a_candidate_that_fails_leaves_the_others_alone():
    left = iter([1.0, 2.0])

    def fails_at_once():
        raise NotImplementedError("no kernel for this\nand much more text")

    def make_sampler(call, warmup):
        return call.function() or (lambda: 1.0)

    def fails_later():
        return lambda: next(left)

    calls = {"good": Call(lambda: None), "bad": Call(fails_at_once), "late": Call(fails_later)}
    samples, errors = timing.take_turns(calls, make_sampler, 4, 0)
    assert samples == {"good": [1.0] * 4}
    assert errors == {"bad": "no kernel for this", "late": "StopIteration"}


def test_the_host_clock_gives_the_time_of_one_call():
    count = []
    sampler = timing.host_sampler(Call(lambda: count.append(torch.zeros(1))), warmup=2)
    warm = len(count)
    assert 0 < sampler() < 0.1
    assert 1 <= len(count) - warm <= timing.MOST_CALLS


class FakeGpu:
    """A clock that a call advances by its cost; events and graphs read it."""

    def __init__(self, monkeypatch, cost):
        self.now, self.cost, self.spins, self.recording = 0.0, cost, [], None
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                gpu.now += self.seconds

        @contextlib.contextmanager
        def capture(graph):
            before = gpu.now
            yield
            graph.seconds, gpu.now = gpu.now - before, before

        class Stream:
            def wait_stream(self, other):
                pass

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "_sleep": self.spins.append,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)

    def call(self):
        self.now += self.cost


@pytest.mark.parametrize(("cost", "calls"), [(5e-3, 1), (2e-4, 5), (1e-6, timing.MOST_CALLS)])
def test_events_enclose_enough_calls_to_last_a_millisecond(monkeypatch, cost, calls):
    gpu = FakeGpu(monkeypatch, cost)
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(gpu.now)
        yield

    sampler = timing.event_sampler(Call(gpu.call, context), warmup=3)
    before = gpu.now
    assert sampler() == pytest.approx(cost)
    assert gpu.now - before == pytest.approx(calls * cost)
    assert entered[-1] == before  # the backend's context is entered outside of the timed part
    assert gpu.spins[-1] > 0  # the GPU is kept busy until all calls are enqueued


def test_a_graph_of_twenty_calls_gives_the_time_of_one(monkeypatch):
    gpu = FakeGpu(monkeypatch, 3e-6)
    sampler = timing.graph_sampler(Call(gpu.call), warmup=2)
    before = gpu.now
    assert sampler() == pytest.approx(3e-6)
    assert gpu.now - before == pytest.approx(20 * 3e-6)


def test_a_replayed_step_gives_its_own_time(monkeypatch):
    gpu = FakeGpu(monkeypatch, 2e-3)
    sampler = replay.replay_sampler(Call(gpu.call), warmup=1)
    before = gpu.now
    assert sampler() == pytest.approx(2e-3)
    assert gpu.now - before == pytest.approx(replay.SECONDS)


def test_throttling_is_read_from_what_nvidia_smi_said_while_busy():
    lines = "1980, 120.0, 40, 0x0000000000000001\n1755, 700.1, 61, 0x0000000000000004\n"
    lines += "1410, 699.0, 66, 0x0000000000000024\n1800, 500.0, 60, 0x0000000000000000\n[N/A], x\n"
    assert machine.clock_facts(lines) == {
        "clock_mhz_min": 1410.0,
        "clock_mhz_median": 1755.0,
        "throttled": "power limit in 2 of 3 seconds, heat in 1 of 3 seconds",
    }
    assert machine.clock_facts("1980, 120.0, 40, 0x0000000000000000\n").keys() == {"clock_mhz_min", "clock_mhz_median"}
    assert machine.clock_facts('Field "clocks_event_reasons.active" is not a valid field to query.\n') == {}


def test_a_machine_without_nvidia_smi_has_fewer_facts(monkeypatch):
    monkeypatch.setattr(machine, "smi_command", lambda fields: ["/nonexistent/nvidia-smi"])
    assert machine.smi_query(["driver_version"]) is None
    watch = machine.ClockWatch("cuda")
    assert watch.stop() == {}


def test_nvidia_smi_is_ended_and_its_lines_are_read(monkeypatch):
    script = "echo '1755, 700.1, 61, 0x4'; exec sleep 60"
    monkeypatch.setattr(machine, "smi_command", lambda fields: ["sh", "-c", script])
    watch = machine.ClockWatch("cuda")
    process = watch.process
    process.stdout.buffer.peek(1)  # waits for the line
    assert watch.stop()["clock_mhz_min"] == 1755
    assert process.poll() is not None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals_only():
    quiet = io.StringIO()
    progress.Progress([1] * 3, quiet).step(0, "cell")
    assert quiet.getvalue() == ""
    terminal = Terminal()
    bar = progress.Progress([1] * 3, terminal)
    bar.say("preparing")
    bar.step(0, "forward d32")
    assert "preparing" in terminal.getvalue() and terminal.getvalue().endswith("[1/3] forward d32")
    bar.step(1, "forward d64")
    assert "[2/3] forward d64, about 0 s left" in terminal.getvalue()
    bar.clear()
    assert terminal.getvalue().endswith("\r\033[K")


def test_the_time_that_is_left_follows_from_the_weights(monkeypatch):
    bar = progress.Progress([3, 1, 1, 4], Terminal())
    clock = iter([500.0, 590.0, 600.0, 612.0])  # 30 seconds a weight, then 10, then 12
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    left = []
    for i in range(4):
        bar.step(i, "case")
        left.append(bar.left())
    assert left == [None, 30 * 6, (30 + 10) / 2 * 5, 12 * 4]
    assert "[2/4] case, about 3 min 0 s left" in bar.stream.getvalue()
    assert [progress.duration(seconds) for seconds in (0.4, 59.4, 200)] == ["0 s", "59 s", "3 min 20 s"]
