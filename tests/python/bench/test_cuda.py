"""`vivace bench attention` on a GPU: the real events, graphs and backends."""

import json

import pytest
import torch

from vivace import cli

pytestmark = pytest.mark.gpu


def test_a_small_run_measures_every_operator_against_torchs_backends(capsys):
    flags = "--device cuda --op forward,varlen,decode,overhead --d 64 --heads 4 --s 256 --batch 4 --mask causal "
    flags += "--lengths 4x20-60 --rows 4 --kv 256 -r 3 --arch auto,80 --dtype bf16 -o json"
    status = cli.main(["bench", "attention", *flags.split()])
    text = capsys.readouterr()
    rows = json.loads(text.out)
    assert status == 0, text.err
    assert [row["op"] for row in rows] == ["forward"] * 2 + ["varlen"] * 2 + ["decode"] + ["overhead"] * 5
    assert rows[0]["arch"] == ("sm90a" if torch.cuda.get_device_capability() == (9, 0) else "sm80")
    assert rows[1]["arch"] == "sm80"
    for row in rows[:2]:
        assert row["ratio_cudnn"] > 0 and row["ratio_fa2"] > 0 and row["tflops"] > 0
    assert rows[4]["ratio_cudnn"] > 0 and rows[4]["in_l2"] is True
    for row in rows[:5]:
        assert row["max_difference"] < 0.1
    for row in rows:
        assert row["gpu"] and row["matmul_tflops"] > 1 and row["copy_gb_s"] > 10


def test_the_same_seed_gives_the_same_hash_twice(capsys):
    def hashes():
        flags = "--device cuda --op forward,decode --d 64 --heads 2 --s 64 --batch 1 --rows 2 --kv 64 -r 1 --peers none"
        assert cli.main(["bench", "attention", *flags.split(), "-o", "json"]) == 0
        return [row["hash"] for row in json.loads(capsys.readouterr().out)]

    assert hashes() == hashes()


def test_a_token_step_is_a_captured_graph_beside_its_floor(capsys):
    flags = "--device cuda --rows 2,6 --tokens 40 --shape real --peers none -r 3 --warmup 1 -o json"
    assert cli.main(["bench", "step", *flags.split()]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["rows"] for row in rows] == [2, 6]
    for row in rows:
        assert row["dtype"] == "bf16" and row["mb"] > 1000 and row["path"].startswith("step_")
        assert 1.0 < row["floor_ratio"] < 30 and 1000 < row["floor_gbps"] < 6000 and row["gpu"]
