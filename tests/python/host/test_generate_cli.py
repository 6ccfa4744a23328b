"""The C++ executable, as a user meets it."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import time

import pytest

TEXT = "Hello there, this is a test."
LENGTH = ("--max-tokens", "12")


def tokens_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["tokens"]


def test_output_says_what_was_generated_and_how(generate, assets, tmp_path):
    output = tmp_path / "tokens.json"
    done = generate("--text", TEXT, "--seed", "7", *LENGTH, "--exaggeration", "0.7", "-o", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    result = json.loads(output.read_text())
    assert result["model"] == str(assets.model)
    assert result["text"] == TEXT
    assert result["seed"] == 7
    assert 1 <= len(result["tokens"]) <= 12
    assert all(0 <= token < 8194 for token in result["tokens"])
    assert result["finish_reason"] in ("stop", "length")
    assert result["seconds"] >= result["time_to_first_token"] > 0
    assert result["sampling"]["temperature"] == 0.8
    assert result["sampling"]["max_tokens"] == 12
    assert result["sampling"]["exaggeration"] == 0.7


def test_text_option_file_and_stdin_give_the_same_tokens(generate, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    expected = tokens_of(generate("--text", TEXT, *LENGTH))
    assert tokens_of(generate("--file", file, *LENGTH)) == expected
    assert tokens_of(generate("--file", "-", *LENGTH, input=TEXT)) == expected
    assert tokens_of(generate(*LENGTH, input=TEXT)) == expected


def test_text_tokens_are_what_the_text_is_tokenized_to(generate):
    done = generate("--text", TEXT, *LENGTH)
    ids = json.loads(done.stdout)["text_tokens"]
    assert tokens_of(generate("--text-tokens", ",".join(map(str, ids)), *LENGTH)) == tokens_of(done)


def test_the_seed_decides_and_the_rng_matters(generate):
    runs = {
        tuple(tokens_of(generate("--text", TEXT, *LENGTH, "--seed", seed, "--rng", rng)))
        for seed in ("1", "2")
        for rng in ("philox", "torch")
    }
    assert len(runs) == 4
    again = tuple(tokens_of(generate("--text", TEXT, *LENGTH, "--seed", "2", "--rng", "torch")))
    assert again in runs


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", "1.5"),
        ("--min-p", "0.9"),
        ("--top-p", "0.1"),
        ("--top-k", "1"),
        ("--repetition-penalty", "0.2"),  # below 1: repeats
        ("--cfg-weight", "50"),
    ],
)
def test_every_sampling_option_has_an_effect(generate, option):
    assert tokens_of(generate("--text", TEXT, "--max-tokens", "30", *option)) != tokens_of(
        generate("--text", TEXT, "--max-tokens", "30")
    )


def test_an_environment_variable_stands_for_each_option(generate):
    expected = tokens_of(generate("--text", TEXT, "--seed", "5", "--temperature", "1.2", *LENGTH))
    environment = {"VIVACE_TEXT": TEXT, "VIVACE_SEED": "5", "VIVACE_TEMPERATURE": "1.2", "VIVACE_MAX_TOKENS": "12"}
    assert tokens_of(generate(env=environment)) == expected


def test_lines_are_requests_with_their_own_seed(generate):
    lines = ["The first line.", "And a second one, which is longer.", "A third."]
    done = generate("--lines", "--batch", "2", "--seed", "4", *LENGTH, input="\n".join(lines) + "\n\n")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [result["text"] for result in results] == lines
    assert [result["seed"] for result in results] == [4, 5, 6]
    for line, result in zip(lines, results, strict=True):
        assert tokens_of(generate("--text", line, "--seed", str(result["seed"]), *LENGTH)) == result["tokens"]


def test_json_has_results_and_statistics(generate):
    done = generate("--text", TEXT, *LENGTH, "--json")
    report = json.loads(done.stdout)
    assert len(report["results"]) == 1
    stats = report["stats"]
    assert stats["device"] == "cpu"
    assert stats["generated_tokens"] == len(report["results"][0]["tokens"])
    assert stats["eager_steps"] == stats["decode_steps"] > 0
    assert stats["peak_memory_bytes"] > stats["weight_bytes"] > 0


def test_a_pipe_gets_no_progress_bar_and_the_summary_has_rate_and_memory(generate):
    done = generate("--text", TEXT, *LENGTH)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "tokens/s" in done.stderr
    assert "first token after" in done.stderr
    assert "memory" in done.stderr
    assert generate("--text", TEXT, *LENGTH, "--quiet").stderr == ""


def test_a_terminal_gets_a_progress_bar(executable, assets):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [
        executable,
        "generate",
        "--model",
        assets.model,
        "--tokenizer",
        assets.tokenizer,
        "--voice",
        assets.voice,
    ]
    command += ["--device", "cpu", "--text", TEXT, "--max-tokens", "40"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=follower) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not chunk:
                break
            seen += chunk
    os.close(leader)
    assert process.returncode == 0
    assert b"\r\x1b[K[" in seen
    assert b"tokens/s" in seen


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_what_was_generated_and_exits_with_130(executable, assets, tmp_path, signal_number):
    output = tmp_path / "tokens.json"
    command = [
        executable,
        "generate",
        "--model",
        assets.model,
        "--tokenizer",
        assets.tokenizer,
        "--voice",
        assets.voice,
    ]
    # An even draw from the vocabulary hardly ever stops.
    command += ["--device", "cpu", "--text", TEXT, "--max-tokens", "4000", "--temperature", "100", "--min-p", "0"]
    with subprocess.Popen([*map(str, command), "-o", str(output)], stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.5)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            with open(f"/proc/{process.pid}/status") as status:  # the handler is there once the model is loaded
                caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
            if caught & (1 << (signal_number - 1)):
                break
            time.sleep(0.02)
        time.sleep(1)
        process.send_signal(signal_number)
        stderr = process.stderr.read()
    assert process.returncode == 130, stderr
    result = json.loads(output.read_text())
    assert result["finish_reason"] == "cancelled"
    assert 0 <= len(result["tokens"]) < 4000


def test_failures_are_one_line_on_stderr_and_status_1(generate, vivace, assets, tmp_path):
    bad = tmp_path / "bad.vivace"
    bad.write_bytes(assets.model.read_bytes()[:5000])
    files = ("--tokenizer", assets.tokenizer, "--voice", assets.voice)
    cases = [
        (vivace("generate", "--model", bad, *files, "--text", TEXT), "bad.vivace"),
        (vivace("generate", "--model", tmp_path / "none.vivace", *files, "--text", TEXT), "none.vivace"),
        (vivace("generate", "--model", assets.voice, *files, "--text", TEXT), "voice.safetensors"),
        (generate("--text", TEXT, "--top-p", "3"), "top_p is 3"),
        (generate("--text", TEXT, "--max-tokens", "5000"), "max_new_tokens is 5000"),
        (generate("--text", TEXT, "--device", "tpu"), "expected auto, cpu, cuda"),
        (generate("--file", tmp_path / "none.txt"), "none.txt"),
        (generate("--text", "word " * 3000), "takes at most 2048"),
        (generate("--text-tokens", "1,2,x"), "expected integers"),
        (generate("--text", TEXT, env={"VIVACE_OPS_LIBRARY": "/none.so"}), "/none.so"),
        (vivace("info", bad), "bad.vivace"),
    ]
    for done, message in cases:
        assert done.returncode == 1, (message, done.stderr)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("vivace") and "vivace: vivace" not in done.stderr, done.stderr
        assert done.stdout == ""


def test_wrong_usage_is_status_2(generate, vivace):
    assert vivace().returncode == 2
    assert vivace("generate", "--text", TEXT).returncode == 2
    assert generate("--text", TEXT, "--nonsense").returncode == 2
    assert generate("--text", TEXT, "--file", "x").returncode == 2
    assert generate("--text", TEXT, "--rng", "dice").returncode == 2
    assert vivace("export").returncode == 2


@pytest.mark.parametrize(
    ("name", "value", "expected", "status"),
    [
        ("VIVACE_CUDA_GRAPHS", "off", "expected 0 or 1", 1),
        ("VIVACE_FUSED_STEP", "2", "expected 0 or 1", 1),
        ("VIVACE_LOG_LEVEL", "loud", "expected debug, info, warning, error or off", 2),
        ("VIVACE_CPU", "sse", "expected one of baseline", 1),
    ],
)
def test_a_variable_of_the_environment_that_means_nothing_is_an_error(generate, name, value, expected, status):
    done = generate("--text", "Hi", "--max-tokens", "2", env={name: value})
    assert done.returncode == status
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vivace") and "vivace: vivace" not in last
    assert f'the environment\'s {name} is "{value}", {expected}' in last
    for fine in ("", "1") if expected == "expected 0 or 1" else ("",):
        assert generate("--text", "Hi", "--max-tokens", "2", env={name: fine}).returncode == 0


def test_info_shows_the_manifest_and_the_machine(vivace, assets):
    done = vivace("info", assets.model, "--json", "--verify")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["manifest"]["kind"] == "t3"
    assert report["manifest"]["source"] == {"random_seed": 3}
    assert report["digest_verified"] is True
    assert report["machine"]["devices"][0]["name"] == "cpu"
    assert report["machine"]["operators"]["operators"] == 1
    text = vivace("info", assets.model).stdout
    assert "random weights, seed 3: its tokens are noise" in text
    assert "4 layers x 128" in text
    assert json.loads(vivace("info", "--json").stdout).keys() == {"machine"}


def test_version_and_help(vivace):
    assert vivace("--version").stdout.startswith("vivace 0.")
    text = vivace("generate", "--help").stdout
    for option in ("--model", "--temperature", "--cfg-weight", "VIVACE_MODEL", "Ctrl-C"):
        assert option in text
