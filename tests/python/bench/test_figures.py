"""Medians, rates and ratios, and the formats that they are written in."""

import json
import math

import pytest

from vivace.bench import figures, output
from vivace.bench.cells import Cell

FORWARD = Cell("forward", d=64, s=512, s_k=512, batch=1, heads=2, heads_kv=2)


def test_quartiles_are_those_of_the_inclusive_method():
    assert figures.summarise([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "n": 5}
    assert figures.summarise([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "n": 1}
    with pytest.raises(ValueError, match="no samples"):
        figures.summarise([])


def test_a_ratio_above_one_says_that_vivace_is_faster():
    ours, peers = [1e-3, 1e-3, 1e-3], {"cudnn": ("bhsd", [2e-3]), "fa3": ("bshd", [0.5e-3])}
    row = figures.row(FORWARD, 4e11, ours, peers, {"matmul_tflops": 800})
    assert row["tflops"] == 400 and row["percent_matmul"] == 50
    assert row["tflops_cudnn"] == 200 and row["ratio_cudnn"] == 2 and row["layout_cudnn"] == "bhsd"
    assert row["best"] == "fa3" and row["ratio_best"] == 0.5
    assert row["ratio_torch"] == 2  # fa3 is not a backend of torch's
    assert row["us"] == 1000 and row["spread_percent"] == 0 and row["samples"] == 3


def test_decoding_is_told_in_bytes_against_the_better_of_copy_and_read():
    cell = Cell("decode", d=64, heads=2, heads_kv=2, rows=1, kv=10)
    row = figures.row(cell, 1e9, [1e-3], {}, {"copy_gb_s": 4000, "read_gb_s": 3000})
    assert row["gbps"] == 1000 and row["percent_read"] == 25
    assert "tflops" not in row and "best" not in row


def test_the_spread_is_the_distance_of_the_quartiles_over_the_median():
    assert figures.row(FORWARD, 1, [1.0, 2.0, 3.0, 4.0, 5.0], {}, {})["spread_percent"] == pytest.approx(
        200 / 3, abs=0.1
    )


def test_of_two_layouts_the_better_one_stands_for_the_peer():
    samples = {("cudnn", "bshd"): [3.0, 3.0], ("cudnn", "bhsd"): [2.0, 2.0], ("fa2", "bshd"): [], ("sdpa", "x"): [1.0]}
    assert figures.better_layouts(samples) == {"cudnn": ("bhsd", [2.0, 2.0]), "sdpa": ("x", [1.0])}


def test_what_json_cannot_say_is_null():
    assert figures.finite(math.nan) is None and figures.finite(math.inf) is None and figures.finite(0.5) == 0.5


def rows():
    figures_of = figures.row(FORWARD, 4e11, [1e-3], {"cudnn": ("bhsd", [2e-3])}, {"matmul_tflops": 800})
    facts = {"gpu": 'A, "GPU"', "driver": "580.10", "cuda": "13.0", "cudnn": "91900", "hash": "123456789012"}
    forward = FORWARD.key() | {"arch": "sm90a", "bar": 1.5} | figures_of | facts
    decode = Cell("decode", d=64, heads=2, heads_kv=2, rows=1, kv=10).key() | {"arch": "80", "in_l2": True} | facts
    return [forward, decode | {"error": "out of memory", "hash": "1e10"}]


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_run_survives_being_written_and_read(form):
    assert output.parse(output.render(rows(), form), form) == rows()


def test_json_is_a_list_of_one_object_for_each_cell():
    found = json.loads(output.render(rows(), "json"))
    assert {"op", "d", "causal", "s", "dtype", "arch", "tflops", "ratio_cudnn"} <= found[0].keys()
    assert json.loads(output.render([], "json")) == []


def test_markdown_heads_the_tables_with_facts_and_notes():
    text = output.render(
        rows(), "md", {"gpu": "NVIDIA H200", "matmul_tflops": 799.0}, ["clocks were held down by heat"]
    )
    assert text.startswith("- GPU: NVIDIA H200\n- matrix product: 799 TFLOP/s\n- **clocks were held down by heat**\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:3]}) == 1 and len({len(line) for line in lines[:3]}) == 1
    assert "400" in lines[2] and "2.00" in lines[2] and "1.50" in lines[2]
    assert "At or above the bar in 1 of 1 cells." in text
    assert "out of memory" in lines[-1]


def test_columns_of_one_value_move_above_the_table():
    small, large = (Cell("forward", d=64, s=s, s_k=s, batch=1024 // s, heads=2, heads_kv=2).key() for s in (256, 512))
    text = output.render([small | {"arch": "sm80"}, large | {"arch": "sm90a"}], "md")
    assert "batch * s 1024, heads * d 128, dtype bf16" in text
    assert "| arch |" in text.replace("  ", " ").replace("  ", " ")
    assert "window" not in text and "batch |" not in text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "run.json"
    output.write(path, "one")
    output.write(path, "two")
    assert path.read_text() == "two" and [p.name for p in path.parent.iterdir()] == ["run.json"]
