"""Everything once, as a stranger would run it: measure on this CPU, compare, report, plan."""

import json

import pytest

from vivace import cli
from vivace.bench import output

COMMANDS = {
    "attention": "--d 16 --heads 2 --s 8,16 --batch 1 --rows 2 --kv 8 --op forward,decode,overhead -r 2 --warmup 1",
    "step": "--rows 1,2 --tokens 8 -r 2 --warmup 1 --peers none",
    "generate": "--batch 1,2 --max-tokens 6 -r 1 --warmup 2 --peers none",
}


@pytest.mark.usefixtures("quick_ceilings")
def test_a_cpu_measures_compares_reports_and_plans(tmp_path, capsys):
    subjects = [name for name in COMMANDS if name != "generate" or cli.find_executable() is not None]
    files = []
    for name in subjects:
        files.append(str(tmp_path / f"{name}.json"))
        status = cli.main(["bench", name, "--device", "cpu", *COMMANDS[name].split(), "--output", files[-1]])
        assert status == 0, capsys.readouterr().err
        assert "- **CPU figures" in capsys.readouterr().out
    assert cli.main(["bench", "compare", files[0], files[0]]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert cli.main(["report", *files, "-o", str(page), "--markdown"]) == 0
    text = page.read_text()
    assert "Measured on a CPU" in text and text.count("<section") >= 3
    for path in files:
        for row in output.read(tmp_path / path):
            assert row["hash"][:12] in text if "hash" in row else row["op"] == "overhead"
    capsys.readouterr()
    assert cli.main(["plan", "--vram", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["requests"] > 10
