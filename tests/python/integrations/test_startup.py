"""VIVACE_ENABLE: what a program gets that was not changed, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__import__("vivace").__file__).resolve().parents[1]
START = "import vivace.startup; vivace.startup.start()\n"  # what vivace.pth runs


def run(code, value, **environment):
    env = {**os.environ, "VIVACE_ENABLE": value, **environment}
    env["PYTHONPATH"] = os.pathsep.join((str(PACKAGE), env.get("PYTHONPATH", "")))
    result = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_a_start_imports_neither_torch_nor_transformers():
    run("import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)", "auto")


def test_the_program_gets_what_the_variable_says_once_it_imports_transformers():
    code = "import transformers.modeling_utils, vivace, flash_attn\n"
    code += "print(vivace.enabled(), flash_attn.flash_attn_func.__module__)"
    assert run(code, "eager, flash_attn").stdout.split() == ["eager", "vivace.flash_attn.functions"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_what_cannot_be_is_one_warning_and_the_program_goes_on():
    code = "vivace.startup.start()\n"  # once more, as where two directories have the .pth
    code += "import transformers.modeling_utils, vivace\nprint(vivace.enabled())"
    result = run(code, "flash_attention_2,fast")
    assert result.stdout.split() == ["None"]
    assert result.stderr.count("VIVACE_ENABLE=flash_attention_2: vivace: flash_attention_2 was asked for, but") == 1
    assert "has 'fast', expected auto, flash_attention_2, sdpa, eager or flash_attn" in result.stderr


def pth_file():
    """vivace.pth of the source tree, or of an installed wheel."""
    return PACKAGE / "vivace.pth"


def test_the_pth_file_does_nothing_without_the_variable():
    code = f"import sys\nexec(open({str(pth_file())!r}).read())\nassert ('vivace' in sys.modules) == {{}}"
    env = {k: v for k, v in os.environ.items() if k != "VIVACE_ENABLE"}
    env["PYTHONPATH"] = str(PACKAGE)
    for value, expected in ((None, False), ("auto", True)):
        if value is not None:
            env["VIVACE_ENABLE"] = value
        subprocess.run([sys.executable, "-c", code.format(expected)], check=True, timeout=60, env=env)
