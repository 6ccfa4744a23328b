"""What all subjects share: --resume, Ctrl-C, the facts in every row."""

import json

import pytest

from vivace import cli
from vivace.bench import attention, output

TINY = ["--device", "cpu", "-r", "2", "--warmup", "1", "--d", "16", "--heads", "2", "--s", "8,16", "--batch", "1"]
TINY += ["--mask", "causal", "--op", "forward", "--peers", "none"]

pytestmark = pytest.mark.usefixtures("quick_ceilings")


def bench(capsys, *flags):
    status = cli.main(["bench", "attention", *TINY, *flags])
    return status, capsys.readouterr()


def counted(monkeypatch):
    """The cells that are measured from now on."""
    measured, compare = [], attention.AttentionBench.compare
    monkeypatch.setattr(
        attention.AttentionBench, "compare", lambda self, cell: measured.append(cell.s) or compare(self, cell)
    )
    return measured


def test_an_interrupted_run_is_finished_by_resume(capsys, monkeypatch, tmp_path):
    path, compare = tmp_path / "run.json", attention.AttentionBench.compare

    def interrupted(self, cell):
        if cell.s == 16:
            raise KeyboardInterrupt
        return compare(self, cell)

    monkeypatch.setattr(attention.AttentionBench, "compare", interrupted)
    assert bench(capsys, "--resume", str(path))[0] == 130
    assert [row["s"] for row in output.read(path)] == [8]

    monkeypatch.setattr(attention.AttentionBench, "compare", compare)
    first = output.read(path)[0]
    measured = counted(monkeypatch)
    status, text = bench(capsys, "--resume", str(path), "-o", "json")
    assert status == 0 and measured == [16]
    assert [row["s"] for row in json.loads(text.out)] == [8, 16]
    assert output.read(path)[0] == first  # as it was measured the first time
    assert "1 of 2 cases are from run.json" in text.err

    assert bench(capsys, "--resume", str(path))[0] == 0 and measured == [16]


def test_resume_measures_what_failed_again(capsys, monkeypatch, tmp_path):
    path = tmp_path / "run.csv"
    bench(capsys, "--output", str(path))
    rows = output.read(path)
    failed = {key: value for key, value in rows[0].items() if key not in ("us", "hash")} | {"error": "out of memory"}
    output.write(path, output.render([failed, rows[1]], "csv"))
    measured = counted(monkeypatch)
    assert bench(capsys, "--resume", str(path))[0] == 0
    assert measured == [8]
    assert sorted(row["s"] for row in output.read(path) if "error" not in row) == [8, 16]


@pytest.mark.parametrize(("field", "value"), [("seed", 7), ("torch", "1.0"), ("cpu", "another"), ("commit", "fff")])
def test_resume_refuses_the_file_of_another_run(capsys, tmp_path, field, value):
    path = tmp_path / "run.json"
    bench(capsys, "--output", str(path))
    rows = [row | {field: value} for row in output.read(path) if field in row or field == "seed"]
    if not rows:
        pytest.skip(f"the rows have no {field} here")
    output.write(path, output.render(rows, "json"))
    status, text = bench(capsys, "--resume", str(path))
    assert status == 1 and "is of another run" in text.err and field in text.err and str(value) in text.err


def test_every_row_has_the_machine_the_settings_and_its_case(capsys):
    for row in json.loads(bench(capsys, "-o", "json")[1].out):
        assert row["case"].startswith("forward d16") and row["seed"] == 0 and row["repetitions"] == 2
        assert row["device"] == "cpu" and row["cpu"] and row["matmul_tflops"] == 0.1 and row["case_seconds"] >= 0


def test_a_file_that_is_no_run_is_named(capsys, tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"a": 1}')
    status, text = bench(capsys, "--resume", str(path))
    assert status == 1 and f"{path}: the file holds no run" in text.err
    status, text = bench(capsys, "--resume", str(tmp_path / "run.md"))
    assert status == 1 and "ends in none of .csv, .json" in text.err
