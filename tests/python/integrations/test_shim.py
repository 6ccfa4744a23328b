"""The name flash_attn: opt-in, accepted by transformers, refused over the real package, and taken away again."""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import models
import pytest
import torch
from models import VERSION

import vivace
from vivace import flash_attn as ours
from vivace.flash_attn import shim


@pytest.fixture
def installed():
    yield vivace.install_flash_attn_shim()
    vivace.uninstall_flash_attn_shim()


def test_nothing_is_there_before_and_nothing_after():
    paths = list(sys.meta_path)
    assert importlib.util.find_spec("flash_attn") is None
    vivace.install_flash_attn_shim()
    vivace.install_flash_attn_shim()  # twice is once
    vivace.uninstall_flash_attn_shim()
    vivace.uninstall_flash_attn_shim()
    assert sys.meta_path == paths and not [n for n in sys.modules if n.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(ImportError):
        import flash_attn  # noqa: F401
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")


def test_the_usual_imports_work(installed):
    import flash_attn
    from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: F401
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401
    from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func  # noqa: F401

    assert flash_attn_func is ours.flash_attn_func
    assert flash_attn.__version__ == ours.__version__ == importlib.metadata.version("flash_attn")
    assert importlib.metadata.version("flash-attn") == ours.__version__
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.util.find_spec("flash_attn") is not None
    importlib.import_module("flash_attn.bert_padding")


def test_the_real_package_is_not_hidden(monkeypatch):
    real = types.ModuleType("flash_attn")
    real.__file__ = "/somewhere/flash_attn/__init__.py"
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    with pytest.raises(RuntimeError, match=r"flash-attn is installed \(/somewhere/flash_attn/__init__.py\)"):
        vivace.install_flash_attn_shim()
    assert sys.modules["flash_attn"] is real
    with shim.visible():
        assert sys.modules["flash_attn"] is not real
    assert sys.modules["flash_attn"] is real


PROBE = """
import torch, vivace
torch.cuda.is_available = lambda: True
vivace.install_flash_attn_shim()
import transformers.utils.import_utils as utils
for _ in range(2):
    assert utils.is_flash_attn_2_available(), "not available"
    vivace.uninstall_flash_attn_shim()
    assert not utils.is_flash_attn_2_available(), "still available"
    vivace.install_flash_attn_shim()
print("good")
"""


def test_transformers_believes_it_before_and_after_it_has_looked():
    package = Path(vivace.__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(package), os.environ.get("PYTHONPATH", "")))}
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0 and "good" in result.stdout, result.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(VERSION < (5, 0), reason="a model of transformers 5")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
@pytest.mark.parametrize("side", ["whole", "left"])
def test_transformers_own_flash_attention_runs_on_our_functions(name, side, installed):
    eager, theirs = models.pair(name, torch.bfloat16, "cuda", implementation="flash_attention_2")
    truth = models.build(name, "eager", torch.float32, "cuda", eager.state_dict())
    ids = models.tokens(2, 19, "cuda")
    mask = torch.ones_like(ids) if side == "whole" else models.padding(2, 19, side, "cuda")
    with torch.no_grad():
        truth, expected, got = (m(ids, attention_mask=mask)[0][mask.bool()] for m in (truth, eager, theirs))
    assert vivace.attention_kernel().startswith("attention_")
    unit = torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (got.float() - truth).abs().max() <= 2 * (expected.float() - truth).abs().max() + unit
