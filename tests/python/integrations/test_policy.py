"""The policy, the journal of patches, and the import hook."""

import importlib
import logging
import sys

import pytest
import torch

from vivace import imports, policy
from vivace.patches import Patches


@pytest.fixture(autouse=True)
def forget():
    policy.forget()
    yield
    policy.forget()


class Gpu:
    """A machine with such a GPU, as far as torch tells."""

    def __init__(self, monkeypatch, capability=(9, 0), name="a card", count=1, operators=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: name)
        monkeypatch.setattr(policy, "_why_no_operators", lambda: operators)


def test_auto_takes_ours_where_gpu_and_dtype_allow(monkeypatch):
    Gpu(monkeypatch)
    choice = policy.choose("cuda", torch.bfloat16)
    assert choice.implementation == "vivace" and "compute capability 9.0, bfloat16" in choice.reason
    assert policy.choose("cuda:0", torch.float16, "flash_attention_2").implementation == "vivace"
    assert policy.choose(wanted="auto").implementation == "vivace"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("float32", "the tensors are float32, and flash kernels take float16 and bfloat16"),
        ("cpu", "the tensors are on cpu"),
        ("old", "a card has compute capability 7.5, and the kernels need 8.0 or newer"),
        ("wide", "head_dim is 320"),
        ("second", "there is no cuda:3, torch sees 1 GPUs"),
        ("broken", "the operators do not load: a wheel for another torch"),
        ("amd", "this torch is for AMD GPUs"),
        ("driver", "looking for a GPU failed: no driver"),
    ],
)
def test_what_stands_in_the_way_is_said(case, reason, monkeypatch):
    operators = "the operators do not load: a wheel for another torch" if case == "broken" else None
    Gpu(monkeypatch, (7, 5) if case == "old" else (8, 0), operators=operators)
    if case == "amd":
        monkeypatch.setattr(torch.version, "hip", "6.2")
    if case == "driver":

        def no_driver():
            raise OSError("no driver")

        monkeypatch.setattr(torch.cuda, "is_available", no_driver)
    device = {"cpu": "cpu", "second": "cuda:3", "driver": None}.get(case, "cuda")
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    head_dim = 320 if case == "wide" else 64
    assert reason in policy.why_not(device, dtype, head_dim)
    if case != "driver":
        choice = policy.choose(device, dtype, head_dim=head_dim)
        assert choice.implementation == "sdpa" and reason in choice.reason
        with pytest.raises(policy.UnavailableError, match="flash_attention_2 was asked for, but") as error:
            policy.choose(device, dtype, "flash_attention_2", head_dim=head_dim)
        assert reason in str(error.value) and isinstance(error.value, ValueError)


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert policy.why_not() == "torch sees no NVIDIA GPU or driver"
    policy.forget()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert policy.why_not("cuda", torch.float16) == "this torch was built for the CPU"
    policy.forget()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "Apple" in policy.choose(torch.device("mps"), torch.float16).reason


def test_sdpa_and_eager_are_what_was_asked_for():
    assert policy.choose("cpu", torch.float32, "sdpa") == ("sdpa", "sdpa was asked for")
    assert policy.choose(None, None, "eager").implementation == "eager"
    with pytest.raises(ValueError, match="wanted is 'flash'"):
        policy.choose(wanted="flash")


def test_a_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "vivace")
    for _ in range(3):
        policy.announce(policy.Choice("sdpa", "the moon is full"), "T3")
    assert [r.getMessage() for r in caplog.records] == ["vivace: T3: sdpa (the moon is full)"]
    assert caplog.records[0].levelno == logging.WARNING


def test_patches_are_undone_exactly():
    class Base:
        def method(self):
            return "base"

    class Derived(Base):
        value = 1

    table = {"a": 1}
    before = dict(vars(Derived))
    patches = Patches()
    patches.set(Derived, "method", lambda self: "ours")
    patches.set(Derived, "value", 2)
    patches.set(Derived, "value", 3)
    patches.set_item(table, "a", 2)
    patches.set_item(table, "b", 3)
    assert Derived().method() == "ours" and Derived.value == 3 and table == {"a": 2, "b": 3} and len(patches) == 5
    patches.undo()
    assert dict(vars(Derived)) == before and table == {"a": 1} and Derived().method() == "base"
    patches.on_undo("bad", lambda: 1 / 0)
    patches.set(Derived, "value", 5)
    patches.on_undo("worse", lambda: [][1])
    with pytest.raises(IndexError):
        patches.undo()
    assert Derived.value == 1  # what fails does not keep the rest from being put back


def test_a_callback_comes_after_the_import(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_module", raising=False)
    seen = []
    imports.when_imported("late_module", lambda module: seen.append(module.value))
    cancelled = lambda module: seen.append("cancelled")  # noqa: E731
    imports.when_imported("late_module", cancelled)
    imports.cancel("late_module", cancelled)
    assert seen == []
    module = importlib.import_module("late_module")
    assert seen == [7] and module.__spec__.loader is module.__loader__ and module.__file__.endswith("late_module.py")
    imports.when_imported("late_module", lambda module: seen.append("at once"))
    assert seen == [7, "at once"]
    importlib.reload(module)
    assert seen == [7, "at once"]
