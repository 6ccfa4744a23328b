"""Llama_520M_Flash: chosen by what is there, logged either way, undone."""

import logging

import pytest
import torch

pytestmark = pytest.mark.chatterbox


@pytest.fixture
def small():
    """Chatterbox's sizes, made small while a test runs."""
    from chatterbox.models.t3 import t3

    from vivace.bench.chatterbox import sized
    from vivace.t3 import preset

    with sized(t3, preset("tiny")):
        yield


@pytest.fixture
def registered(small):
    from vivace.chatterbox import register_llama_520m_flash, unregister_llama_520m_flash

    register_llama_520m_flash()
    yield
    unregister_llama_520m_flash()


def logged(caplog):
    return [record.message for record in caplog.records if record.name == "vivace"]


def test_the_configurations_differ_in_attention_alone(registered):
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS

    plain, flash = LLAMA_CONFIGS["Llama_520M"], dict(LLAMA_CONFIGS["Llama_520M_Flash"])
    assert flash.pop("_attn_implementation") == flash.pop("attn_implementation") == "flash_attention_2"
    assert flash == {name: value for name, value in plain.items() if name != "attn_implementation"}
    assert "GPT2_medium_Flash" not in LLAMA_CONFIGS


def test_without_flash_attention_t3_is_standard_and_says_so(registered, monkeypatch, caplog):
    from chatterbox.models.t3.t3 import T3, T3Config

    monkeypatch.setattr("vivace.chatterbox.flash_config.why_not", lambda: "there is no CUDA device")
    with caplog.at_level(logging.INFO, "vivace"):
        t3 = T3(T3Config.english_only())
    assert t3.cfg._attn_implementation == "sdpa"
    assert logged(caplog) == ["Flash-Attention2 not available: Using standard SDPA configuration"]
    assert not t3._flash_attention_available()


def test_with_flash_attention_t3_takes_it(registered, monkeypatch, caplog):
    from chatterbox.models.t3 import t3 as chatterbox

    monkeypatch.setattr("vivace.chatterbox.flash_config.why_not", lambda: None)
    seen = []

    class Llama(chatterbox.LlamaModel):
        def __init__(self, config):
            seen.append(config._attn_implementation)
            config._attn_implementation = "sdpa"  # flash_attention_2 itself cannot be built here
            super().__init__(config)

    monkeypatch.setattr(chatterbox, "LlamaModel", Llama)
    hp = chatterbox.T3Config.english_only()
    with caplog.at_level(logging.INFO, "vivace"):
        t3 = chatterbox.T3(hp)
    assert seen == ["flash_attention_2"]
    assert t3.hp is hp and hp.llama_config_name == "Llama_520M"
    assert logged(caplog) == ["Flash-Attention2 detected: Using optimized configuration"]
    chatterbox.T3()  # without an argument: the English model
    assert seen == ["flash_attention_2"] * 2


def test_a_failing_constructor_leaves_hp_alone(registered, monkeypatch):
    from chatterbox.models.t3 import t3 as chatterbox

    monkeypatch.setattr("vivace.chatterbox.flash_config.why_not", lambda: None)

    def fail(config):
        raise RuntimeError("no flash")

    monkeypatch.setattr(chatterbox, "LlamaModel", fail)
    hp = chatterbox.T3Config.english_only()
    with pytest.raises(RuntimeError, match="no flash"):
        chatterbox.T3(hp)
    assert hp.llama_config_name == "Llama_520M"


def test_everything_is_undone(small):
    from chatterbox.models.t3 import t3 as chatterbox

    from vivace import backend
    from vivace.chatterbox import register_llama_520m_flash, unregister_llama_520m_flash

    before = dict(vars(chatterbox.T3)), dict(chatterbox.LLAMA_CONFIGS), backend.enabled()
    register_llama_520m_flash()
    register_llama_520m_flash()
    assert dict(vars(chatterbox.T3)) != before[0]
    unregister_llama_520m_flash()
    unregister_llama_520m_flash()
    assert (dict(vars(chatterbox.T3)), dict(chatterbox.LLAMA_CONFIGS), backend.enabled()) == before


def test_a_failure_while_registering_is_undone(small, monkeypatch):
    from chatterbox.models.t3 import t3 as chatterbox

    from vivace.chatterbox import flash_config

    before = dict(vars(chatterbox.T3)), dict(chatterbox.LLAMA_CONFIGS)

    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(flash_config.functools, "wraps", fail)
    with pytest.raises(RuntimeError, match="injected"):
        flash_config.register_llama_520m_flash()
    assert (dict(vars(chatterbox.T3)), dict(chatterbox.LLAMA_CONFIGS)) == before


@pytest.mark.parametrize(
    ("capability", "available", "expected"),
    [
        ((8, 0), True, None),
        ((8, 9), True, None),
        ((9, 0), True, None),
        ((7, 5), True, "compute capability 7.5 is below 8.0"),
        ((8, 9), False, "there is no CUDA device"),
    ],
)
def test_capability_8_0_and_newer(monkeypatch, capability, available, expected):
    from vivace import backend
    from vivace.chatterbox.flash_config import flash_attention_available, why_not

    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(backend, "flash_attn_installed", lambda: True)
    assert why_not() == expected
    assert flash_attention_available() == (expected is None)


def test_a_broken_driver_is_no_flash_attention(monkeypatch):
    from vivace.chatterbox.flash_config import why_not

    def broken():
        raise RuntimeError("cuInit failed")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert why_not() == "cuInit failed"


def test_vivace_enable_registers_it(small):
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS

    from vivace.chatterbox import on_startup, unregister_llama_520m_flash

    on_startup("sdpa")
    assert "Llama_520M_Flash" not in LLAMA_CONFIGS
    on_startup("auto")
    assert "Llama_520M_Flash" in LLAMA_CONFIGS
    unregister_llama_520m_flash()
    assert "Llama_520M_Flash" not in LLAMA_CONFIGS
