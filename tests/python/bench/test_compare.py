"""`vivace bench compare`: noise, direction, machines, exit status."""

import json

import pytest

from vivace import cli
from vivace.bench import output


@pytest.fixture
def compare(capsys, tmp_path):
    """compare(rows_before, rows_after, *flags) -> (status, stdout, stderr)"""

    def run(before, after, *flags):
        for name, rows in (("a.json", before), ("b.json", after)):
            output.write(tmp_path / name, output.render(rows, "json"))
        status = cli.main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *flags])
        text = capsys.readouterr()
        return status, text.out, text.err

    return run


def test_what_is_slower_beyond_the_noise_gives_status_3(compare, forward_row):
    before = [forward_row(100.0, "a"), forward_row(100.0, "b"), forward_row(100.0, "c")]
    status, out, _ = compare(before, [forward_row(110.0, "a"), forward_row(101.0, "b"), forward_row(80.0, "c")])
    assert status == 3
    assert "+10.0% | 100 | 110 | us, slower | a, sm90a" in out and "-20.0% | 100 | 80 | us, faster | c" in out
    assert "1 slower, 1 faster, 1 within the noise" in out and "| b, sm90a |" not in out


def test_faster_alone_is_status_0(compare, forward_row):
    assert compare([forward_row(100.0)], [forward_row(50.0)])[0] == 0


def test_quartiles_that_overlap_are_noise_however_far_the_medians_are(compare, forward_row):
    wide = {"us_q1": 80.0, "us_q3": 130.0}
    status, out, _ = compare([forward_row(100.0, **wide)], [forward_row(115.0, **wide)], "--all")
    assert status == 0 and "us, same" in out


def test_a_smaller_threshold_finds_smaller_changes(compare, forward_row):
    quiet = {"us_q1": 100.0, "us_q3": 100.0}
    before, after = [forward_row(100.0, **quiet)], [forward_row(102.0, us_q1=102.0, us_q3=102.0)]
    assert compare(before, after)[0] == 0
    assert compare(before, after, "--threshold", "1")[0] == 3


@pytest.mark.parametrize(("field", "value"), [("gpu", "NVIDIA H100"), ("power_limit_w", 350.0), ("device", "cpu")])
def test_different_machines_are_refused_with_status_4(compare, forward_row, field, value):
    before, after = [forward_row(100.0)], [forward_row(200.0, **{field: value})]
    status, out, err = compare(before, after)
    assert status == 4 and not out and str(value) in err and "--different-machines" in err
    status, out, _ = compare(before, after, "--different-machines")
    assert status == 3 and "different machines" in out


def test_two_units_of_one_kind_may_differ_more(compare, forward_row):
    before = [forward_row(100.0)]
    status, out, _ = compare(before, [forward_row(105.0, unit="ffffffff")])
    assert status == 0 and "two units of one kind of GPU: changes below 7 %" in out
    assert compare(before, [forward_row(109.0, unit="ffffffff")])[0] == 3


def test_versions_outputs_and_cases_of_one_run_alone_are_told(compare, forward_row):
    before = [forward_row(100.0, "a"), forward_row(1.0, "b"), forward_row(1.0, "d")]
    after = [forward_row(100.0, "a", torch="2.12.0", hash="ffffffffffff"), forward_row(1.0, "c"), forward_row(1.0, "d")]
    after[-1] |= {"error": "out of memory"}
    status, out, _ = compare(before, after)
    assert status == 0
    assert "torch 2.11.0, now 2.12.0" in out and "another output: a, sm90a" in out
    assert "only in the first run: b" in out and "only in the second run: c" in out
    assert "failed in the second run: d, sm90a: out of memory" in out


def test_another_seed_is_not_compared(compare, forward_row):
    both = [forward_row(1.0, "b")]
    status, out, _ = compare([forward_row(100.0, "a"), *both], [forward_row(200.0, "a", seed=1), *both])
    assert status == 0 and "not compared, seed is 0 and 1" in out


def test_more_memory_and_later_first_tokens_are_worse(compare, forward_row):
    def row(**fields):
        kept = {k: v for k, v in forward_row(1.0).items() if not k.startswith("us")}
        base = {"op": "generate", "case": "g", "implementation": "vivace", "model": "random", "seconds": 1.0}
        return kept | base | {"first_token_ms": 3.0, "vram_peak_gib": 2.0} | fields

    status, out, _ = compare([row()], [row(vram_peak_gib=2.4)])
    assert status == 3 and "GiB at the peak, more" in out and "1 with more memory" in out
    assert compare([row()], [row(first_token_ms=4.0)])[0] == 3
    assert compare([row()], [row(vram_peak_gib=1.5, first_token_ms=2.0)])[0] == 0


def test_json_says_the_same(compare, forward_row):
    status, out, _ = compare([forward_row(100.0)], [forward_row(120.0)], "-o", "json")
    found = json.loads(out)
    assert status == 3 and found["worse"] is True
    assert found["changes"][0]["verdict"] == "slower" and found["changes"][0]["percent"] == pytest.approx(20)


def test_runs_without_a_common_case_are_an_error(compare, forward_row):
    status, _, err = compare([forward_row(1.0, "a")], [forward_row(1.0, "b")])
    assert status == 1 and "no case in common" in err
    status, _, err = compare([], [forward_row(1.0, "b")])
    assert status == 1 and "has no rows" in err
