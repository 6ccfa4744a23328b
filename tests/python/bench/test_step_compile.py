"""The peers that are compiled ahead: which run side by side, and that an interrupted run ends them."""

import json
import subprocess
import sys

import pytest
import torch

from vivace import cli
from vivace.bench import step, step_compile


def test_cores_and_memory_say_how_many_run_at_once():
    waiting = [({}, 40e9), ({}, 10e9), ({}, 5e9)]
    assert step_compile.next_job(waiting, [], cores=16, free=140e9) == 0
    assert step_compile.next_job(waiting, [90e9], cores=16, free=140e9) == 0
    assert step_compile.next_job(waiting, [110e9], cores=16, free=140e9) == 1  # the largest has no room now
    assert step_compile.next_job(waiting, [138e9], cores=16, free=140e9) is None
    assert step_compile.next_job(waiting, [1e9] * 5, cores=16, free=140e9) is None
    assert step_compile.next_job([], [], cores=16, free=140e9) is None


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, free): what the machine has; the programs that were started, each one a sleep."""
    started = []

    def make(cores, free, seconds=0.2):
        monkeypatch.setattr(step_compile.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))

        def start(job, environment):
            assert "VIVACE_ENABLE" not in environment
            process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
            started.append((job["rows"], process))
            return process

        monkeypatch.setattr(step_compile, "start", start)
        return started

    return make


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """torch's caches, empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def jobs(*rows):
    return [({"rows": n}, n * 1e8) for n in rows]


def test_all_are_compiled_the_largest_first(machine, monkeypatch):
    monkeypatch.setenv("VIVACE_ENABLE", "auto")
    started = machine(cores=7, free=20e9)
    step_compile.compile_ahead(jobs(1, 2, 40))
    assert [rows for rows, _ in started] == [40, 2, 1]
    assert all(process.poll() == 0 for _, process in started)


def test_what_the_caches_have_is_not_compiled_again(machine, monkeypatch):
    pytest.importorskip("transformers")
    started = machine(cores=16, free=100e9)
    for job, _ in jobs(2, 40):
        step_compile.mark(job)
    step_compile.compile_ahead(jobs(1, 2, 40, 128))
    assert [rows for rows, _ in started] == [128, 1]
    monkeypatch.setattr(torch, "__version__", "0.0")  # another torch's caches are of no use
    assert not step_compile.marker(jobs(2)[0][0]).exists()


@pytest.mark.parametrize(("cores", "free", "rows"), [(4, 20e9, (1, 2)), (16, 5e9, (1, 40)), (16, 20e9, (2,))])
def test_without_room_for_two_at_once_none_is(machine, cores, free, rows):
    started = machine(cores, free)
    step_compile.compile_ahead(jobs(*rows))
    assert started == []


def test_an_interrupted_run_ends_them(machine, monkeypatch):
    started = machine(cores=16, free=100e9, seconds=60)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step_compile.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step_compile.compile_ahead(jobs(1, 2))
    assert len(started) == 2 and all(process.poll() is not None for _, process in started)


def test_a_job_says_all_that_a_process_needs(tmp_path):
    flags = ["--rows", "2,128", "--tokens", "300", "--seed", "7", "--device", "cpu"]
    arguments = cli.build_parser().parse_args(["bench", "step", *flags])
    bench = step.StepBench(arguments, "cpu", step.cases(arguments, cpu=False))
    job, cache = bench.compile_job(bench.cases[1])
    assert cache == 128 * 1024 * 120 * 1024  # 30 layers of keys and values, 16 heads of 64, for 1,024 positions
    assert json.loads(json.dumps(job)) == {
        "rows": 128, "tokens": 300, "shape": "real", "dtype": "bf16", "model": None, "device": "cpu", "seed": 7
    }  # fmt: skip


def test_one_is_compiled_by_calling_it(monkeypatch):
    pytest.importorskip("transformers")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    step_compile.compile_one(2, 8, "tiny", "fp32", None, "cpu", 0)
    assert [options["mode"] for options in compiled] == ["reduce-overhead"]
