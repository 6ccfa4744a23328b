"""`vivace bench attention` end to end, on the CPU with tiny shapes."""

import json

import pytest

from vivace import cli
from vivace.bench import attention, machine, output, timing

TINY = ["--device", "cpu", "-r", "3", "--warmup", "1", "--d", "16", "--heads", "2", "--s", "8", "--batch", "1"]
TINY += ["--rows", "2", "--kv", "8", "--lengths", "2x3-5", "--mask", "causal"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda *_: {"matmul_tflops": 0.1, "copy_gb_s": 10.0, "read_gb_s": 12.0})


def bench(capsys, *flags):
    status = cli.main(["bench", "attention", *TINY, *flags])
    return status, capsys.readouterr()


def test_every_operator_is_measured_against_torch(capsys):
    status, text = bench(capsys, "--op", "forward,varlen,decode,overhead", "-o", "json")
    rows = json.loads(text.out)
    assert status == 0 and [row["op"] for row in rows] == ["forward", "varlen", "decode", *["overhead"] * 5]
    for row in rows:
        assert row["device"] == "cpu" and row["arch"] == "cpu" and row["torch"] and row["seed"] == 0
        assert row["us"] > 0 and row["us_sdpa"] > 0 and row["samples"] == 3
        assert row["ratio_sdpa"] == pytest.approx(row["us_sdpa"] / row["us"], rel=1e-3)
    for row in rows[:3]:
        assert row["max_difference"] < 1e-5 and len(row["hash"]) == 12
    assert rows[0]["tflops"] > 0 and rows[0]["causal"] is True and rows[0]["s"] == 8
    assert (rows[2]["hq"], rows[2]["hkv"], rows[2]["rows"], rows[2]["s"]) == (2, 2, 2, 8)
    assert [row["from"] for row in rows[3:]] == ["Python"] * 3 + ["C++"] * 2
    assert rows[2]["gbps"] > 0 and rows[2]["percent_read"] == pytest.approx(rows[2]["gbps"] / 0.12, rel=0.01)
    assert "CPU figures" in text.err


def test_the_output_hash_is_the_seeds(capsys):
    def hashes(*flags):
        return [row["hash"] for row in json.loads(bench(capsys, "--op", "forward,decode", "-o", "json", *flags)[1].out)]

    first = hashes()
    assert hashes() == first
    assert not set(hashes("--seed", "1")) & set(first)
    assert hashes("--peers", "none", "-r", "1") == first


def test_the_file_and_stdout_say_the_same_in_their_formats(capsys, tmp_path):
    path = tmp_path / "run.json"
    status, text = bench(capsys, "--op", "forward", "-o", "csv", "--output", str(path))
    assert status == 0
    assert output.parse(text.out, "csv") == output.parse(path.read_text(), "json")


def test_markdown_says_on_what_it_was_measured(capsys):
    text = bench(capsys, "--op", "forward", "--arch", "80")[1].out
    assert "- device: cpu" in text and "- **CPU figures" in text and "--arch chooses among CUDA kernels" in text
    assert "vivace TFLOP/s" in text and "/ sdpa" in text


def test_ctrl_c_prints_what_was_measured_so_far(capsys, monkeypatch, tmp_path):
    measure = attention.AttentionBench.compare

    def interrupted(self, cell):
        if cell.op == "decode":
            raise KeyboardInterrupt
        return measure(self, cell)

    monkeypatch.setattr(attention.AttentionBench, "compare", interrupted)
    path = tmp_path / "run.csv"
    status, text = bench(capsys, "--op", "forward,decode,overhead", "--output", str(path))
    assert status == 130
    assert "interrupted after 1 of 3 cases" in text.out and "**Forward" in text.out
    assert [row["op"] for row in output.parse(path.read_text(), "csv")] == ["forward"]


def test_an_output_that_differs_from_the_peers_is_told(capsys, monkeypatch):
    monkeypatch.setattr(attention.tensors, "difference", lambda a, b: float("nan"))
    status, text = bench(capsys, "--op", "forward", "-o", "json")
    assert "the output differs from sdpa's by nan in forward d16" in text.err
    assert status == 0 and json.loads(text.out)[0]["max_difference"] is None


def test_a_cell_that_fails_is_told_and_the_others_are_measured(capsys):
    status, text = bench(capsys, "--op", "forward", "--d", "16,512", "-o", "json")
    good, bad = json.loads(text.out)
    assert status == 1 and good["us"] > 0
    assert bad["d"] == 512 and "head_dim" in bad["error"] and "us" not in bad


def test_a_lost_context_ends_the_run_with_what_there_is(capsys, monkeypatch):
    def lost(self, cell):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def settle(error):
        raise error

    monkeypatch.setattr(attention.AttentionBench, "compare", lost)
    monkeypatch.setattr(timing, "settle", settle)
    status, text = bench(capsys, "--op", "overhead,forward,decode", "-o", "json")
    rows = json.loads(text.out)
    assert status == 1 and [row["op"] for row in rows] == ["overhead"] * 5 + ["forward"]
    assert "illegal memory access" in rows[-1]["error"] and "ended after 1 of 3 cases" in text.err


def test_cells_can_be_listed_without_measuring(capsys):
    status, text = bench(capsys, "--op", "forward,decode", "--list")
    assert status == 0
    assert text.out == "forward d16 2:2 heads causal 1x8 fp32\ndecode d16 2:2 heads 2 rows over 8 fp32\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-r", "0"], "--repetitions must be 1 or more"),
        (["--output", "run.txt"], "run.txt ends in none of .md, .csv, .json"),
        (["--heads-kv", "3"], "heads_kv 3 does not divide heads 2"),
    ],
)
def test_wrong_values_are_refused_in_one_line(capsys, flags, message):
    status, text = bench(capsys, *flags)
    assert status == 1 and message in text.err and text.err.count("\n") == 1 and not text.out


def test_ceilings_of_this_machine_are_measured(monkeypatch):
    monkeypatch.undo()
    import torch

    found = machine.ceilings("cpu", torch.float32, repetitions=1)
    assert found.keys() == {"matmul_tflops", "copy_gb_s", "read_gb_s"} and min(found.values()) > 0
