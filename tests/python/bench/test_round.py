""".ci/gpu's benchmarks: their flags are ones that `vivace bench` knows, and none begins before it is told."""

import importlib.util
from pathlib import Path

import pytest

from vivace import cli

CI = Path(__file__).resolve().parents[3] / ".ci"


@pytest.fixture
def gpu_round(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    spec = importlib.util.spec_from_file_location("gpu_round", CI / "gpu_round.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_has_flags_that_exist(gpu_round):
    for file, arguments, seconds in gpu_round.BENCHES.values():
        assert cli.build_parser().parse_args(["bench", *arguments]).subject == arguments[0]
        assert file.endswith("-h200") and seconds > 0


def test_a_benchmark_waits_until_it_is_told(gpu_round):
    flags = ["attention", "--device", "cpu", "--op", "forward", "--d", "16", "--s", "8", "--list"]
    gpu_round.BENCHES = dict.fromkeys(("one", "two"), ("run", flags, 60))
    with gpu_round.prepared(["one", "two"]) as ready:
        assert all(process.poll() is None for process, _ in ready.values())
        record = gpu_round.run_bench("two", *ready["two"])
        assert record["result"] == "ok" and record["log"].count("forward d16") == 2  # both masks
        assert ready["one"][0].poll() is None
    assert ready["one"][0].returncode != 0  # ended, as it was never told


def test_a_benchmark_that_cannot_begin_has_failed(gpu_round):
    gpu_round.BENCHES = {"one": ("run", ["attention", "--no-such-flag"], 60)}
    with gpu_round.prepared(["one"]) as ready:
        record = gpu_round.run_bench("one", *ready["one"])
    assert record["result"] == "FAILED" and "--no-such-flag" in record["log"]
