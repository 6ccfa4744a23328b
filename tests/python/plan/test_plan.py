"""`vivace plan`: the arithmetic, what is fitted to measurements, and what it prints."""

import json
from pathlib import Path

import pytest

from vivace import cli, plan, t3

RESULTS = Path(__file__).resolve().parents[3] / "docs/results/generate-h200.json"
CARDS = RESULTS.with_name("cards-h200.json")
OVERHEAD = plan.Overhead(600e6, 2e6, "a test")


def row(requests, peak, **fields):
    base = {"op": "generate", "implementation": "vivace", "requests": requests, "max_tokens": 1000, "cfg_weight": 0.5}
    base |= {"weight_bytes": 1_063_352_320, "dtype": "bfloat16", "kv_bytes_per_token": 122_880, "prompt_tokens": 148}
    return base | {"vram_peak_gib": peak / plan.GIB, "gpu": "a GPU", "driver": "1"} | fields


def test_memory_is_weights_cache_and_overhead():
    found = plan.predict(plan.Shape(), 20, 1000, text_tokens=110, overhead=OVERHEAD)
    assert found.rows == 40
    assert found.weights == 1_063_352_320
    assert found.kv == 40 * (34 + 112 + 2 + 1000) * 120 * 1024
    assert found.overhead == 600e6 + 40 * 2e6 and found.total == found.weights + found.kv + found.overhead
    assert plan.predict(plan.Shape(), 20, 1000, guided=False, overhead=OVERHEAD).rows == 20


def test_a_thousand_positions_should_take_no_more_than_a_tenth_above_their_bytes():
    one, twenty, many = (plan.aim(1.063e9, 2 * requests * 1000 * 122_880) / 1e9 for requests in (1, 20, 64))
    assert (round(one, 1), round(twenty, 1), round(many, 1)) == (2.0, 7.2, 19.1)


def test_the_largest_batch_is_the_last_that_fits():
    for limit in (2e9, 8e9, 12 * plan.GIB, 24 * plan.GIB):
        found = plan.largest_batch(limit, plan.Shape(), 1000, overhead=OVERHEAD)
        if found is None:
            assert plan.predict(plan.Shape(), 1, 1000, overhead=OVERHEAD).total > limit
            continue
        assert found.total <= limit
        assert plan.predict(plan.Shape(), found.requests + 1, 1000, overhead=OVERHEAD).total > limit
    assert plan.largest_batch(1e9, plan.Shape(), 1000, overhead=OVERHEAD) is None


def test_the_overhead_is_recovered_from_measurements():
    rows = [
        row(n, plan.predict(plan.Shape(), n, 1000, text_tokens=110, overhead=OVERHEAD).total) for n in (1, 2, 20, 64)
    ]
    other = [row(1, 99 * plan.GIB, implementation="Chatterbox eager"), {"op": "step"}, {"op": "generate", "error": "x"}]
    found = plan.fit([*rows, *other])
    assert found.process == pytest.approx(OVERHEAD.process, abs=2) and found.row == pytest.approx(OVERHEAD.row, abs=2)
    assert found.source.startswith("one a GPU, driver 1")
    one = plan.fit(rows[:1])
    assert one.row == 0 and one.process == pytest.approx(604e6, abs=2)
    with pytest.raises(ValueError, match="no generation of vivace on a GPU"):
        plan.fit(other)


def test_the_largest_error_is_told_with_its_sign():
    exact = [row(n, plan.predict(plan.Shape(), n, 1000, text_tokens=110, overhead=OVERHEAD).total) for n in (1, 20)]
    assert plan.largest_error(exact, OVERHEAD) == pytest.approx(0, abs=1e-6)
    exact[1]["vram_peak_gib"] *= 1.25
    assert plan.largest_error(exact, OVERHEAD) == pytest.approx(-20)


def test_the_shape_is_the_one_of_an_exported_model(tmp_path):
    path = tmp_path / "t3.vivace"
    manifest = t3.export(path, random=True, shape="tiny", dtype="fp16")["manifest"]
    shape = plan.model_shape(manifest)
    assert shape.weight_bytes == 2 * manifest["model"]["parameters"]
    assert shape.kv_bytes_per_token == 2 * 4 * 2 * 64 * 2 and shape.dtype == "float16"


def test_the_default_shape_is_the_real_model():
    from math import prod

    from vivace.t3.config import preset
    from vivace.t3.layout import layout

    config = preset("real")
    assert plan.Shape().parameters == sum(prod(entry.shape) for entry in layout(config))
    assert plan.Shape().kv_bytes_per_token == 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    assert plan.Shape().conditioning == config.cond_length
    assert plan.shape_of("fp32").kv_bytes_per_token == 2 * plan.Shape().kv_bytes_per_token


def measured_rows(file=RESULTS):
    rows = json.loads(file.read_text()) if file.is_file() else []
    return [r for r in rows if r.get("vram_peak_gib") and r["implementation"] == "vivace"] if type(rows) is list else []


@pytest.mark.skipif(not measured_rows(), reason="docs/results/generate-h200.json has no memory of whole processes")
def test_predictions_are_within_5_percent_of_what_was_measured():
    for measured in (*measured_rows(), *measured_rows(CARDS)):
        assert plan.predict_row(measured) / plan.GIB == pytest.approx(measured["vram_peak_gib"], rel=0.05)


@pytest.mark.skipif(not measured_rows(CARDS), reason="docs/results/cards-h200.json has no memory of whole processes")
def test_what_was_planned_for_a_card_fitted_into_it():
    batches = sorted(measured_rows(CARDS), key=lambda row: row["requests"])
    assert len(batches) == len(plan.SIZES)
    for size, measured in zip(plan.SIZES, batches, strict=True):
        assert measured["max_tokens"] == 1000 and measured["vram_peak_gib"] <= size
        assert plan.predict_row(measured) == pytest.approx((size - plan.RESERVE) * plan.GIB, rel=0.05)  # and filled it


def test_the_table_has_the_usual_cards(capsys):
    assert cli.main(["plan", "--tokens", "1000"]) == 0
    text = capsys.readouterr().out
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|  ")]
    assert [float(size) for size, _ in lines] == [8, 12, 16, 24]
    batches = [int(requests) for _, requests in lines]
    assert batches == sorted(batches) and batches[0] > 5
    assert "1000 speech tokens (40 s) a request" in text and "measured on" in text


def test_a_run_of_the_own_gpu_takes_the_place_of_the_built_in_measurement(capsys, tmp_path):
    path = tmp_path / "run.json"
    peaks = [plan.predict(plan.Shape(), n, 1000, text_tokens=110, overhead=plan.Overhead(3e9, 0, "")) for n in (1, 20)]
    path.write_text(json.dumps([row(p.requests, p.total) for p in peaks]))
    assert cli.main(["plan", "--vram", "8", "--json"]) == 0
    usual = json.loads(capsys.readouterr().out)["plans"][0]
    assert cli.main(["plan", "--vram", "8", "--json", "--measured", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overhead"]["process"] == pytest.approx(3e9, rel=1e-3)
    assert found["plans"][0]["requests"] < usual["requests"]


def test_what_does_not_fit_is_said(capsys):
    assert cli.main(["plan", "--vram", "1", "--tokens", "1000"]) == 0
    assert "|         1 |                0 |" in capsys.readouterr().out
    assert cli.main(["plan", "--tokens", "0"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["plan", "--vram", "12,big"])
