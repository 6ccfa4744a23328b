"""The doctor says what is there and what is broken, and never fails for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def installed():
    import vivace

    return str(Path(vivace.__file__).parents[1])


#: A finder that lets an import fail, for a program started with it.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise {error}
sys.meta_path.insert(0, Block())
"""


def run_doctor(*arguments, before="", env=None):
    """The command in a process of its own: (exit status, its JSON)."""
    program = f"{before}\nimport sys\nfrom vivace.cli import main\nsys.exit(main(['doctor', '--json', *sys.argv[1:]]))"
    environment = {**os.environ, **(env or {})}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [installed(), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def block(*names, error="ImportError('blocked by the test')"):
    return BLOCK.format(names=names, error=error)


def test_a_working_installation():
    status, report = run_doctor()
    assert report["operators"]["loaded"] and report["operators"]["self_test"]["ok"]
    assert report["operators"]["self_test"]["passed"] >= 4
    assert report["operators"]["self_test"]["seconds"] <= 10
    assert report["packages"]["torch"]["version"].split("+")[0] == torch.__version__.split("+")[0]
    assert status == report["status"] == (0 if report["gpu"]["usable"] else 3)
    if not torch.cuda.is_available():
        assert not report["gpu"]["usable"] and report["gpu"]["reason"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ImportError('blocked by the test')", "blocked by the test"),
        ("OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
    ],
)
def test_without_torch(error, said):
    status, report = run_doctor(before=block("torch", error=error))
    assert status == 4
    assert said in report["packages"]["torch"]["error"]
    assert not report["operators"]["loaded"] and not report["engine"]["loaded"] and not report["gpu"]["usable"]
    assert any("torch does not import" in line for line in report["advice"])


def test_without_transformers_and_chatterbox():
    status, report = run_doctor("--no-self-test", before=block("transformers", "chatterbox"))
    assert status in (0, 3) and report["operators"]["loaded"]
    if report["packages"]["transformers"]["version"]:
        assert "blocked" in report["packages"]["transformers"]["error"]


def test_a_model_without_transformers_is_an_answer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, report = run_doctor("--no-self-test", "--model", tmp_path, before=block("transformers"))
    assert status == 5 and "blocked by the test" in report["model"]["error"]


def not_a_library(path):
    path.write_bytes(b"\x7fELF" + b"\0" * 100)
    return path


def another_library(path):
    """One that loads, and has none of our operators, as a much older version has not all of them."""
    return shutil.copyfile(next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.so")), path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path, "does not exist"),
        (not_a_library, "does not load"),
        (another_library, "does not go with this Python package"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_a_wrong_library_in_the_environment_is_not_mended_by_installing(tmp_path, make, reason, installed):
    chosen, ours = make(tmp_path / "libvivace_ops.so"), tmp_path / "installed.so"
    if installed:
        ours.touch()
    before = f"from pathlib import Path\nfrom vivace import library\nlibrary.INSTALLED = Path({str(ours)!r})"
    status, report = run_doctor(env={"VIVACE_OPS_LIBRARY": str(chosen)}, before=before)
    assert status == 4 and reason in report["operators"]["reason"]
    advice = report["advice"][0]
    assert f"VIVACE_OPS_LIBRARY names {chosen}" in advice and "reinstall vivace" not in advice
    if installed:
        assert advice.endswith(f"unset VIVACE_OPS_LIBRARY, and {ours} is used")
    else:
        assert "none is installed" in advice and "pip install" in advice


@pytest.mark.parametrize("content", [None, b"\x7fELF"])
def test_a_broken_installation_is_mended_by_installing(tmp_path, content):
    ours = tmp_path / "libvivace_ops.so"
    if content is not None:
        ours.write_bytes(content)
    before = f"from pathlib import Path\nfrom vivace import library\nlibrary.INSTALLED = Path({str(ours)!r})"
    status, report = run_doctor(env={"VIVACE_OPS_LIBRARY": ""}, before=before)
    assert status == 4 and str(ours) in report["operators"]["reason"]
    assert report["advice"][0].startswith("reinstall vivace for this torch: pip install")


def test_an_engine_for_another_torch(tmp_path):
    from importlib.machinery import EXTENSION_SUFFIXES

    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    status, report = run_doctor("--no-self-test", env={"VIVACE_EXTENSION_DIR": str(tmp_path)})
    assert status in (0, 3) and report["operators"]["loaded"]
    assert not report["engine"]["loaded"] and "does not load with torch" in report["engine"]["reason"]
    assert any(f"VIVACE_EXTENSION_DIR names {tmp_path}" in line for line in report["advice"])


def test_a_broken_engine_is_mended_by_installing():
    before = "from vivace import extension\ndef find():\n    raise ImportError('none')\nextension.find = find"
    status, report = run_doctor("--no-self-test", env={"VIVACE_EXTENSION_DIR": ""}, before=before)
    assert status in (0, 3) and not report["engine"]["loaded"]
    assert any("the C++ engine is not for this torch or Python" in line for line in report["advice"])


def test_a_broken_driver():
    before = """
import torch
def broken(*a):
    raise RuntimeError('Unexpected error from cudaGetDeviceCount()')
torch.cuda.is_available = broken
"""
    status, report = run_doctor("--no-self-test", before=before)
    assert status == 3
    assert "cudaGetDeviceCount" in report["machine"]["gpus"]["error"]
    assert "cudaGetDeviceCount" in report["gpu"]["reason"]


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("torch.version.hip = '6.2'", "AMD"),
        (
            "torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
            "torch.cuda.current_device = lambda: 0; torch.cuda.get_device_capability = lambda *a: (7, 5)\n"
            "torch.cuda.get_device_name = lambda *a: 'Tesla T4'",
            "Tesla T4 has compute capability 7.5",
        ),
        ("torch.version.cuda = None", "built for the CPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_ours(before, reason):
    status, report = run_doctor("--no-self-test", before=f"import torch\n{before}")
    assert status == 3 and reason in report["gpu"]["reason"]


def test_the_self_test_finds_wrong_numbers(monkeypatch):
    from vivace import ops
    from vivace.doctor import selftest

    real = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, eps: real(x, weight, eps) * 1.5)
    result = selftest.run("rms_norm", selftest.test_rms_norm, "cpu", torch.float32)
    assert "differs from torch by" in result["error"]
    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, eps: real(x, weight, eps) * float("nan"))
    assert "error" in selftest.run("rms_norm", selftest.test_rms_norm, "cpu", torch.float32)
    monkeypatch.undo()
    assert "error" not in selftest.run("rms_norm", selftest.test_rms_norm, "cpu", torch.float32)


def test_a_crash_in_the_self_test_is_its_result(monkeypatch, tmp_path):
    from vivace.doctor import operators

    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\necho half a line\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    result = operators.run_self_test()
    assert not result["ok"] and "status -11" in result["error"]


def test_called_from_python():
    import vivace
    import vivace.doctor as module

    report = vivace.doctor(self_test=False)
    assert module(self_test=False).status == report.status == report["status"]
    text = str(report)
    assert text == repr(report)
    for word in ("driver", "torch", "transformers", "chatterbox-tts", "flash-attn", "operators", "engine", "status"):
        assert word in text, word


def test_layers_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    from vivace.doctor.model import examine

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    config._attn_implementation = "eager"
    model = transformers.LlamaModel(config)
    answer = examine(model)
    assert [layer["implementation"] for layer in answer["layers"]] == ["eager", "eager"]
    assert any("vivace.enable" in line for line in answer["advice"])
    model.config.output_attentions = True
    answer = examine(model)
    assert all("output_attentions" in layer["reason"] for layer in answer["layers"])
    assert any("output_attentions = False" in line for line in answer["advice"])


def test_layers_of_a_model_s_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from vivace.doctor.model import examine

    transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    ).save_pretrained(tmp_path)
    answer = examine(tmp_path)
    assert len(answer["layers"]) == 2 and all(layer["reason"] for layer in answer["layers"])


def test_layers_of_an_archive_and_a_checkpoint(tmp_path):
    from safetensors.torch import save_file

    from vivace import t3
    from vivace.doctor.model import examine

    t3.export(tmp_path / "t3.vivace", random=True, shape="tiny")
    weights = t3.RandomWeights(t3.preset("tiny"), 0)
    save_file({name: weights.read(name) for name in weights.shapes}, tmp_path / "t3_cfg.safetensors")
    for path in ("t3.vivace", "t3_cfg.safetensors"):
        answer = examine(tmp_path / path)
        assert [layer["implementation"] for layer in answer["layers"]] == ["vivace"] * 4, answer


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half an archive", b"{}"])
def test_what_is_no_model_is_an_answer(tmp_path, content):
    from vivace.doctor.model import examine

    for name in ("x.vivace", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert examine(tmp_path / name)["error"]
    pytest.importorskip("transformers")
    assert "no such file or folder" in examine(str(tmp_path / "nowhere"))["error"]
    assert "neither a torch module" in examine(object())["error"]
    assert "no attention layer" in examine(torch.nn.Linear(2, 2))["error"]


@pytest.mark.chatterbox
def test_a_chatterbox_pipeline_before_and_after(tmp_path):
    from types import SimpleNamespace

    from chatterbox_t3 import build_t3

    from vivace import accelerate, restore
    from vivace.doctor.model import examine
    from vivace.t3 import preset

    tts = SimpleNamespace(t3=build_t3(preset("tiny"), 0))
    before = examine(tts)
    assert before["kind"] == "Chatterbox T3" and not before["accelerated"]
    assert "as it is, T3 runs on transformers' sdpa in float32" in before["advice"][0]
    assert [layer["implementation"] for layer in before["layers"]] == ["vivace"] * 4
    accelerate(tts, implementation="eager")
    after = examine(tts)
    assert after["accelerated"] and after["layers"][0] == {
        "layer": "tfmr.layers.0",
        "implementation": "eager",
        "reason": "eager was asked for",
    }
    restore(tts)


@pytest.mark.chatterbox
def test_t3_is_built_run_and_measured():
    status, report = run_doctor("--no-self-test", "--t3", "tiny")
    assert status == (0 if report["gpu"]["usable"] else 3), report["trial"]
    steps = {step["step"]: step for step in report["trial"]["steps"]}
    assert list(steps) == ["model initialisation", "forward", "generation"] and all(s["ok"] for s in steps.values())
    assert steps["forward"]["shapes"]["speech_logits"] == [1, 11, 8194]
    assert steps["generation"]["tokens"] >= 1 and steps["generation"]["ms_per_token"] > 0


def test_t3_without_chatterbox_is_vivace_s():
    before = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'chatterbox' else real(name, *a)
"""
    _, report = run_doctor("--no-self-test", "--t3", "tiny", before=before)
    assert report["trial"]["t3"] == "vivace" and report["trial"]["ok"], report["trial"]
    assert report["trial"]["steps"][1]["shapes"]["logits"] == [1, 8194]


def test_a_failing_t3_is_status_4():
    before = "from vivace.doctor import trial\ntrial._device = lambda: 1 / 0\n"
    status, report = run_doctor("--no-self-test", "--t3", "tiny", before=before)
    assert status == 4 and "division" in report["trial"]["steps"][0]["error"]


def test_the_command_s_help_lists_the_exit_statuses(capsys):
    from vivace.cli import main

    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    for status in (0, 2, 3, 4, 5):
        assert f"\n  {status}  " in out
