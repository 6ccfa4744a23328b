"""`vivace bench generate`: what the engine's process is asked, what is made of its answer, and a whole run on a CPU."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from vivace import cli, plan, t3
from vivace.bench import chatterbox, generate, models, process, tables

PROGRAM = """\
    #!{python}
    import json, sys
    arguments = sys.argv[1:]
    if "--help" in arguments:
        print("  --batch INT, --warmup INT, {options}")
        raise SystemExit
    lines = sys.stdin.read().splitlines()
    given = dict(zip(arguments, arguments[1:]))
    open({log!r}, "a").write(json.dumps([given, "--ignore-stop" in arguments, len(lines)]) + "\\n")
    if {fails} and len(lines) == 2:
        print("loading\\nvivace: not enough memory", file=sys.stderr)
        raise SystemExit(1)
    tokens = int(given["--max-tokens"])
    first = [0.01 * (i + 1) for i in range(len(lines))]
    results = [dict(tokens=[1] * tokens, prompt_tokens=50, time_to_first_token=seconds) for seconds in first]
    stats = dict(dtype="bfloat16", device="cpu", decode_steps=10, decode_seconds=0.02, weight_bytes=1000)
    stats["cache_bytes"] = 2 * len(lines) * (50 + tokens) * 2 * 4 * 2 * 64 * 4  # the tiny model's: fp32, 2 heads of 64
    stats["load_seconds"] = 1.0
    answer = dict(results=results, seconds=2.0, stats=stats)
    if "--repeat" in given:
        answer["runs"] = [
            dict(seconds=1.0 + i, tokens=tokens * len(lines), time_to_first_token=[0.02, 0.01, 0.03])
            for i in range(int(given["--repeat"]))
        ]
    print(json.dumps(answer))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(options, fails): an executable that says what it was asked; its log as a list of (options, flag, lines)."""
    log = tmp_path / "log"

    def make(options="--repeat INT --ignore-stop", fails=False):
        path = tmp_path / "fake-vivace"
        text = textwrap.dedent(PROGRAM).format(python=sys.executable, options=options, fails=fails, log=str(log))
        path.write_text(text)
        path.chmod(0o755)
        process.generate_options.cache_clear()
        monkeypatch.setenv("VIVACE_EXECUTABLE", str(path))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return make


@pytest.fixture
def bench(capsys, quick_ceilings):
    def run(*flags):
        status = cli.main(["bench", "generate", "--device", "cpu", "--peers", "none", "-o", "json", *flags])
        text = capsys.readouterr()
        return status, json.loads(text.out) if text.out.startswith("[") else [], text.err

    return run


def test_the_engine_is_asked_for_whole_warm_requests(fake, bench):
    log = fake()
    status, rows, _ = bench("--batch", "1,3", "--max-tokens", "40", "-r", "2", "--warmup", "5", "--cfg-weight", "0.3")
    assert status == 0
    for (given, ignored, lines), row, requests in zip(log(), rows, (1, 3), strict=True):
        assert ignored and lines == requests == row["requests"]
        assert (given["--max-tokens"], given["--warmup"], given["--repeat"]) == ("40", "5", "2")
        assert (given["--batch"], given["--cfg-weight"], given["--device"]) == (str(requests), "0.3", "cpu")
        assert Path(given["--model"]).name == "random.vivace"


def test_figures_follow_from_the_runs(fake, bench):
    fake()
    row = bench("--batch", "3", "--max-tokens", "50", "-r", "3")[1][0]
    assert row["seconds"] == 2.0 and row["samples"] == 3 and row["tokens"] == 150 and row["short"] is False
    assert row["tokens_per_s"] == 75 and row["rtf"] == 3.0  # 6 s of speech in 2 s
    assert row["first_token_ms"] == 20 and row["ms_per_step"] == 2.0 and row["prompt_tokens"] == 50
    assert row["hash"] and row["rss_peak_gib"] >= 0 and "output" not in row
    assert row["positions"] == 100  # of each of its six rows


def test_memory_is_held_against_the_plan_and_the_aim(fake, bench, monkeypatch):
    fake()
    readings = iter([0, 0, 0])  # before the process: settled, then the base; 1 GiB from then on
    monkeypatch.setattr(generate.memory, "gpu_memory", lambda device: lambda: next(readings, 2**30))
    monkeypatch.setattr(generate.memory, "PERIOD", 60)  # one look there must be, however short the process
    row = bench("--batch", "3", "--max-tokens", "50", "-r", "1")[1][0]
    held = row["cache_bytes"]
    assert row["vram_peak_gib"] == 1.0 and held == 6 * row["positions"] * row["kv_bytes_per_token"]
    assert row["vram_aim_gib"] == pytest.approx((1.1 * (row["weight_bytes"] + held) + 0.6e9) / 2**30, abs=1e-3)
    assert row["plan_error_percent"] == pytest.approx(100 * (row["plan_gib"] - 1), abs=0.1)


def test_the_table_has_the_spread_of_several_samples(fake, bench):
    fake()
    rows = bench("--batch", "1,2", "--max-tokens", "50", "-r", "3")[1]
    table = tables.tables(rows)[0]
    place = table.headings.index("±")
    assert table.headings[place - 1] == "tokens/s" and [line[place] for line in table.lines] == ["50.0%"] * 2
    assert "±" not in tables.tables([row | {"samples": 1} for row in rows])[0].headings


def test_an_older_executable_is_measured_process_by_process(fake, bench):
    log = fake(options="")
    status, rows, _ = bench("--batch", "1", "-r", "3")
    assert status == 0 and len(log()) == 3 and not log()[0][1] and "--repeat" not in log()[0][0]
    assert rows[0]["samples"] == 3 and rows[0]["seconds"] == 2.0


def test_models_take_turns_and_one_that_fails_is_told(fake, bench, tmp_path):
    log = fake()
    files = []
    for name in ("a", "b"):
        files.append(str(tmp_path / f"{name}.vivace"))
        t3.export(files[-1], random=True, seed=1, shape="tiny", dtype="fp32")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no checkpoint")
    status, rows, err = bench("--models", *files, str(broken), "--batch", "1", "-r", "2")
    assert [Path(given["--model"]).stem for given, _, _ in log()] == ["a", "b", "b", "a"]
    assert [(row["model"], "error" in row) for row in rows] == [
        ("a.vivace", False),
        ("b.vivace", False),
        ("broken.safetensors", True),
    ]
    assert status == 0 and "broken.safetensors is not measured: " in err
    assert bench("--models", str(broken), "--batch", "1", "-r", "1")[0] == 1


def test_a_batch_that_does_not_fit_is_told_and_the_next_is_measured(fake, bench):
    fake(fails=True)
    status, rows, _ = bench("--batch", "1-3", "-r", "1")
    assert status == 1 and [row.get("error") for row in rows] == [None, "vivace: not enough memory", None]


def test_a_checkpoint_is_exported_and_given_assets(tmp_path):
    source = tmp_path / "checkpoints"
    source.mkdir()
    t3.export(source / "t3.vivace", random=True, seed=1, shape="tiny", dtype="fp32", assets=source)
    folder = tmp_path / "made"
    folder.mkdir()
    files = {"tokenizer": None, "voice": None}
    found, failed = models.prepare([str(source / "t3.vivace")], folder, "tiny", "fp32", 0, files)
    assert not failed and found[0].archive == source / "t3.vivace" and found[0].tokenizer.parent == source
    (source / "voice.safetensors").unlink()
    folder = tmp_path / "again"
    folder.mkdir()
    found, _ = models.prepare([str(source / "t3.vivace"), str(source / "none")], folder, "tiny", "fp32", 0, files)
    assert found[0].voice.parent.parent == folder and found[0].voice.is_file()
    assert models.unique(["t3", "a", "t3"]) == ["t3 (1)", "a", "t3 (2)"]


def test_the_batches_of_the_table_are_the_default_on_a_gpu():
    assert generate.BATCHES == (1, 2, 5, 10, 20, 64)
    arguments = cli.build_parser().parse_args(["bench", "generate", "--models", "a", "b", "--batch", "2-8*2"])
    assert arguments.models == ["a", "b"] and arguments.batch == [2, 4, 8]


def test_resume_refuses_a_run_of_another_text_or_dtype(fake, bench, tmp_path):
    fake()
    path = str(tmp_path / "run.json")
    assert bench("--batch", "1", "-r", "1", "--resume", path)[0] == 0
    assert bench("--batch", "1", "-r", "1", "--resume", path)[0] == 0
    for flags, told in ((("--text", "Another."), "text"), (("--dtype", "bf16"), "export_dtype")):
        status, _, err = bench("--batch", "1", "-r", "1", "--resume", path, *flags)
        assert status == 1 and f"is of another run: {told}" in err


def test_the_batches_of_cards_are_those_that_the_planner_gives_them(capsys):
    def batches(*flags, cpu=False):
        arguments = cli.build_parser().parse_args(["bench", "generate", *flags])
        return generate.batches(arguments, cpu, 1000)

    assert cli.main(["plan", "--vram", "8,24", "--json"]) == 0
    planned = [card["requests"] for card in json.loads(capsys.readouterr().out)["plans"]]
    assert batches("--vram", "8,24") == planned
    assert batches("--vram", "8", "--batch", "1,2") == [1, 2, planned[0]]
    assert batches("--vram", "24", "--cfg-weight", "0")[0] > 1.8 * planned[1]  # one row a request
    with pytest.raises(ValueError, match="--vram 1: not even one request of 1000 tokens"):
        batches("--vram", "1")
    with pytest.raises(ValueError, match="--vram plans the memory of a GPU"):
        batches("--vram", "8", cpu=True)


def real_executable():
    from vivace.bench import process

    path = cli.find_executable()
    if path is None:
        pytest.skip("the vivace executable is not built")
    process.generate_options.cache_clear()
    return path


def test_a_cpu_runs_it_on_a_tiny_model_and_says_so(bench):
    real_executable()
    status, rows, err = bench("--batch", "1,2", "--max-tokens", "6", "-r", "1", "--warmup", "2")
    assert status == 0 and "CPU figures" in err
    assert [row["requests"] for row in rows] == [1, 2]
    for row in rows:
        assert row["shape"] == "tiny" and 0 < row["tokens"] <= 6 * row["requests"] and row["device"] == "cpu"
        assert row["first_token_ms"] > 0 and row["rtf"] > 0 and row["rss_peak_gib"] > 0.05
        assert "vram_peak_gib" not in row
        # The text is as long as Chatterbox's own T3 gets, and what the planner expects.
        assert row["prompt_tokens"] == plan.Shape.conditioning + plan.TEXT_TOKENS + 4
        assert row["positions"] == row["prompt_tokens"] + row["max_tokens"]
    again = bench("--batch", "1", "--max-tokens", "6", "-r", "1", "--warmup", "2")[1]
    assert again[0]["hash"] == rows[0]["hash"]


@pytest.mark.chatterbox
def test_chatterboxs_own_t3_is_measured_beside_it(capsys, quick_ceilings):
    if chatterbox.available():
        pytest.skip(chatterbox.available())
    real_executable()
    flags = ["--device", "cpu", "--peers", "eager", "--batch", "1", "--max-tokens", "6", "--peer-tokens", "3"]
    assert cli.main(["bench", "generate", *flags, "-r", "1", "--warmup", "2", "-o", "json"]) == 0
    own, peer = json.loads(capsys.readouterr().out)
    assert (own["implementation"], peer["implementation"]) == ("vivace", "Chatterbox eager")
    assert peer["tokens"] == 3 and peer["dtype"] == "float32" and 0 < peer["first_token_ms"] < 1e3 * peer["seconds"]
    assert peer["ratio_vivace"] == pytest.approx(own["tokens_per_s"] / peer["tokens_per_s"], rel=1e-3)


def test_a_peers_process_waits_for_its_job_and_is_ended_where_there_is_none(monkeypatch):
    script = "import sys; print('ready', flush=True); print('{\"runs\": [], \"job\": ' + sys.stdin.read() + '}')"
    command = [sys.executable, "-c", script]
    monkeypatch.setattr(process, "start", lambda _, environment, start=process.start: start(command, environment))
    work = process.Workload(1, 8, 0.5, "", 2, 1, 0, "cpu")
    peer = process.Chatterbox("sdpa", "tiny", 5)
    peer.start()
    peer.wait_until_ready()
    ahead = peer.started
    assert ahead.poll() is None
    runs, found = peer.run(work, None)
    assert ahead.returncode == 0 and runs == [] and found["job"]["form"] == "sdpa" and found["job"]["max_tokens"] == 8
    assert peer.run(work, None)[1]["job"] == found["job"]  # by a process of its own
    peer.start()
    ahead = peer.started
    peer.close()
    assert ahead.returncode != 0 and peer.started is None
    peer.close()


def test_a_process_that_is_interrupted_is_ended(monkeypatch, tmp_path):
    note = tmp_path / "pid"
    script = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupted(self, *_, **__):
        while not note.exists() or not note.read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(process.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.run(lambda: process.start([sys.executable, "-c", script]), None)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
