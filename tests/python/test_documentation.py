"""The documentation's Python runs as it stands, where it needs no model's files."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: File, words of the block, and a package that it needs.
BLOCKS = [
    ("README.md", 'vivace.enable("auto")', "transformers"),
    ("README.md", "install_flash_attn_shim", "torch"),
    ("docs/transformers.md", "vivace.transformers.register()", "transformers"),
    ("docs/transformers.md", "activate_flash_attention_impl", "torch"),
]


@pytest.mark.parametrize(("file", "words", "package"), BLOCKS)
def test_a_block_of_python_runs(file, words, package):
    import torch

    import vivace

    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    blocks = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S) if words in b]
    assert len(blocks) == 1, f"{file} has {len(blocks)} blocks with {words!r}"
    code = blocks[0]
    if not torch.cuda.is_available():
        code = code.replace(', device="cuda", dtype=torch.bfloat16', "")
    if "activate_flash_attention_impl" in code and not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        pytest.skip(f"torch {torch.__version__} has no registry of flash attention")
    package_path = str(Path(vivace.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package_path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
