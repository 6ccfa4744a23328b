"""The `vivace` command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vivace import cli, t3


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for command in ("export", "voice", "generate", "info", "version"):
        assert f"\n    {command} " in text


def test_export_writes_a_model_and_assets_that_the_host_can_start_from(tmp_path, capsys):
    command = [
        "export",
        "--random",
        "--seed",
        "3",
        "--shape",
        "tiny",
        "--dtype",
        "fp32",
        "-o",
        str(tmp_path / "t3.vivace"),
    ]
    assert cli.main([*command, "--assets", str(tmp_path), "--json"]) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert summary["bytes"] == (tmp_path / "t3.vivace").stat().st_size
    assert summary["manifest"] == t3.verify(tmp_path / "t3.vivace")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t3.vivace", "tokenizer.json", "voice.safetensors"]
    assert "4 layers of 128" in output.err
    assert cli.main([*command, "--quiet"]) == 0
    output = capsys.readouterr()
    assert output.out == output.err == ""


def test_failures_are_one_line_and_status_1(tmp_path, capsys):
    cases = [
        (["export", "--checkpoint", "missing.safetensors"], "checkpoint missing.safetensors is neither a file"),
        (["export", "--random", "--assets", str(tmp_path / "x" / "y"), "--checkpoint", "a"], None),
        (["voice", "missing.pt"], "No such file"),
        (["voice"], "expected either a voice file or --random"),
        (["voice", "--random", "-o", str(tmp_path / "x" / "out")], "there is no folder"),
    ]
    for command, message in cases:
        command = [*command, *([] if "-o" in command else ["-o", str(tmp_path / "out")])]
        if message is None:
            with pytest.raises(SystemExit) as end:
                cli.main(command)
            assert end.value.code == 2
            assert "not allowed with" in capsys.readouterr().err
            continue
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("vivace")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_voice_writes_a_random_voice(tmp_path, capsys):
    assert cli.main(["voice", "--random", "--seed", "5", "-o", str(tmp_path / "voice.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["t3.speaker_emb"] == [1, 256]


def vivace(*arguments, **environment):
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "vivace", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@pytest.fixture
def executable(tmp_path):
    """A stand-in for the C++ executable: prints its arguments and where it would look for libraries."""
    script = tmp_path / "host"
    script.write_text('#!/bin/sh\nprintf "%s|" "$@"; echo "$LD_LIBRARY_PATH"; exit 5\n')
    script.chmod(0o755)
    return str(script)


def test_host_commands_get_every_argument_and_their_exit_status(executable):
    result = vivace("generate", "--text", "--help me", "-h", "", VIVACE_EXECUTABLE=executable, LD_LIBRARY_PATH="/first")
    assert result.returncode == 5
    *arguments, libraries = result.stdout.rstrip("\n").split("|")
    assert arguments == ["generate", "--text", "--help me", "-h", ""]
    assert libraries.startswith("/first:")
    assert libraries.endswith("torch/lib")


def test_a_missing_executable_is_named():
    result = vivace("info", "t3.vivace", VIVACE_EXECUTABLE="/nowhere/vivace")
    assert result.returncode == 1
    assert result.stderr.startswith("vivace info: the C++ executable is missing (VIVACE_EXECUTABLE is /nowhere/vivace)")


def test_starting_the_host_and_showing_help_do_not_import_torch(executable):
    code = (
        "import sys\nfrom vivace import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit: pass\n"
        "cli.main(['version'])\nassert cli.find_executable()\nassert 'torch' not in sys.modules"
    )
    path = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path, "VIVACE_EXECUTABLE": executable}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"vivace {cli.package_version()}\n" in result.stdout
