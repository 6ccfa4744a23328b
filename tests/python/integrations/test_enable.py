"""vivace.enable and vivace.disable: what models get that do not name us, and that all of it is put back."""

import copy
import logging

import models
import pytest
import torch
import transformers
from models import VERSION
from transformers import PreTrainedModel, modeling_utils

import vivace
from vivace import policy
from vivace.transformers import explain, registry

METHODS = (
    "_check_and_adjust_attn_implementation",
    "get_correct_attn_implementation",
    "_autoset_attn_implementation",
    "post_init",
)


def snapshot():
    """Everything in transformers that we may change."""
    state = {name: vars(PreTrainedModel).get(name) for name in METHODS}
    functions = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is not None:
        state["functions"] = dict(getattr(functions, "_global_mapping", functions))
    try:
        from transformers.masking_utils import AttentionMaskInterface

        state["masks"] = dict(AttentionMaskInterface._global_mapping)
    except ImportError:
        pass
    from transformers import modeling_flash_attention_utils as utils

    state["flash"] = {k: v for k, v in vars(utils).items() if not k.startswith("__")}
    state["rules"] = vars(registry.rules).copy()
    return state


@pytest.fixture(autouse=True)
def put_back():
    policy.forget()
    yield
    vivace.disable()
    registry.unregister()


def implementations(model):
    return {entry["implementation"] for entry in explain(model)}


@pytest.mark.parametrize("wanted", policy.WANTED)
def test_disable_restores_every_attribute(wanted, pretend_gpu):
    before = snapshot()
    vivace.enable(wanted)
    assert vivace.enabled() == wanted
    model = models.build("llama", None)
    model(models.tokens(1, 5))
    vivace.disable()
    assert vivace.enabled() is None
    assert snapshot() == before
    model(models.tokens(1, 5))  # it still runs


def test_an_exception_in_the_middle_leaves_nothing_behind(pretend_gpu, monkeypatch):
    before = snapshot()
    monkeypatch.setattr(vivace.backend, "_serve_flash_functions", lambda patches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vivace.enable("auto")
    assert snapshot() == before and vivace.enabled() is None
    monkeypatch.undo()


def test_import_activates_nothing():
    before = snapshot()
    import vivace.chatterbox
    import vivace.ops
    import vivace.transformers

    assert snapshot() == before and vivace.enabled() is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "whisper"])
def test_auto_gives_ours_to_models_that_name_nothing(name, pretend_gpu, caplog):
    caplog.set_level(logging.INFO, "vivace")
    choice = vivace.enable("auto")
    assert choice == ("vivace", "a GPU that the test pretends")
    model = models.build(name, None)
    assert implementations(model) == {"vivace"}
    assert implementations(models.build(name, "eager")) == {"eager"}
    assert implementations(models.build(name, "sdpa")) == {"sdpa"}
    messages = [r.getMessage() for r in caplog.records]
    assert any(type(model).__name__ in m and "vivace (a GPU that the test pretends)" in m for m in messages)
    vivace.disable()
    assert implementations(model) == {"sdpa"}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
@pytest.mark.parametrize("wanted", ["auto", "flash_attention_2"])
def test_the_name_flash_attention_2_works_without_flash_attn(wanted, name, pretend_gpu):
    eager = models.build(name, "eager")
    vivace.enable(wanted)
    ours = models.build(name, "flash_attention_2", state=eager.state_dict())
    assert implementations(ours) == {"vivace"}
    ids, mask = models.tokens(2, 15), models.padding(2, 15, "left")
    with torch.no_grad():
        expected, got = (m(ids, attention_mask=mask)[0][mask.bool()] for m in (eager, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    vivace.disable()
    with pytest.raises((ImportError, ValueError)):
        models.build(name, "flash_attention_2")


@pytest.mark.skipif(VERSION < (4, 54), reason="set_attn_implementation came with transformers 4.54")
def test_a_model_can_be_switched_to_the_literal(pretend_gpu):
    model = models.build("llama", "sdpa")
    vivace.enable("flash_attention_2")
    model.set_attn_implementation("flash_attention_2")
    assert implementations(model) == {"vivace"}
    model.set_attn_implementation("vivace")
    assert implementations(model) == {"vivace"}
    model.set_attn_implementation("sdpa")
    assert implementations(model) == {"sdpa"}


def test_flash_attention_2_is_an_error_where_it_cannot_be(monkeypatch):
    before = snapshot()
    monkeypatch.setattr(policy, "_why_not", lambda device, dtype, head_dim: "the GPU is of clay")
    with pytest.raises(policy.UnavailableError, match="flash_attention_2 was asked for, but the GPU is of clay"):
        vivace.enable("flash_attention_2")
    assert snapshot() == before and vivace.enabled() is None


def test_a_call_that_the_kernels_cannot_run_is_an_error_with_the_literal_and_sdpa_with_auto(pretend_gpu, monkeypatch):
    from vivace.transformers import attention

    vivace.enable("flash_attention_2")
    model = models.build("llama", "flash_attention_2")
    monkeypatch.setattr(attention, "_why_not_here", lambda *args: "the tensors are made of cheese")
    with pytest.raises(policy.UnavailableError, match="made of cheese"):
        model(models.tokens(1, 4))
    vivace.enable("auto")
    eager = models.build("llama", "eager")
    model = models.build("llama", "flash_attention_2", state=eager.state_dict())
    ids, mask = models.tokens(2, 15), models.padding(2, 15, "left")
    with torch.no_grad():
        expected, got = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (eager, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_without_a_gpu_auto_runs_everything_on_sdpa_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(policy, "_why_not", lambda device, dtype, head_dim: "torch sees no NVIDIA GPU or driver")
    choice = vivace.enable("auto")
    assert choice == ("sdpa", "torch sees no NVIDIA GPU or driver")
    for name in (None, "flash_attention_2"):
        assert implementations(models.build("llama", name)) == {"sdpa"}
    assert any("no NVIDIA GPU" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)


def test_auto_leaves_a_model_that_cannot_take_ours_to_what_it_can(pretend_gpu, caplog):
    """Bloom has no AttentionInterface in any version."""
    config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4)
    config._attn_implementation = "flash_attention_2"
    vivace.enable("auto")
    model = transformers.BloomForCausalLM(copy.deepcopy(config))
    assert model.config._attn_implementation == "eager"
    model(models.tokens(1, 5))
    assert any("BloomForCausalLM" in r.getMessage() and "eager" in r.getMessage() for r in caplog.records)
    vivace.enable("flash_attention_2")
    with pytest.raises(ValueError, match=r"BloomForCausalLM .* cannot take its place|no sdpa attention"):
        transformers.BloomForCausalLM(config)


@pytest.mark.skipif(not (4, 48) <= VERSION < (5, 0), reason="ModernBERT before it had an AttentionInterface")
def test_auto_leaves_a_model_with_attention_functions_of_its_own_alone(pretend_gpu, caplog):
    config = transformers.ModernBertConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        reference_compile=False,
    )
    vivace.enable("auto")
    for name in (None, "flash_attention_2"):
        mine = copy.deepcopy(config)
        mine._attn_implementation = name
        model = transformers.ModernBertModel(mine).eval()
        assert model.config._attn_implementation == "sdpa"
        model(models.tokens(1, 5))
    assert any("attention functions of its own" in r.getMessage() for r in caplog.records)
    config._attn_implementation = "vivace"
    with pytest.raises(ValueError, match=r"attention functions of its own.*attn_implementation=\"sdpa\""):
        transformers.ModernBertModel(config)


def test_eager_is_the_default_when_asked_for():
    vivace.enable("eager")
    assert implementations(models.build("llama", None)) == {"eager"}
    vivace.enable("sdpa")
    assert implementations(models.build("llama", None)) == {"sdpa"}


def test_an_installed_flash_attn_keeps_its_name_unless_forced(pretend_gpu, monkeypatch):
    monkeypatch.setattr(vivace.backend, "flash_attn_installed", lambda: True)
    vivace.enable("flash_attention_2")
    assert registry.rules.literal is None
    vivace.enable("flash_attention_2", force=True)
    assert registry.rules.literal == "vivace"


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="wanted is 'fast', expected one of auto, flash_attention_2, sdpa, eager"):
        vivace.enable("fast")


@pytest.mark.skipif(VERSION < (4, 54), reason="_lazy_imports came with transformers 4.54")
def test_transformers_own_glue_gets_our_functions(pretend_gpu):
    from transformers import modeling_flash_attention_utils as utils

    from vivace import flash_attn

    vivace.enable("flash_attention_2")
    result = utils._lazy_imports("flash_attention_2")
    assert flash_attn.flash_attn_func in result and flash_attn.flash_attn_varlen_func in result
    import sys

    assert "flash_attn" not in sys.modules


def test_registering_by_name_alone_touches_no_other_model(caplog):
    vivace.transformers.register()
    assert implementations(models.build("llama", None)) == {"sdpa"}
    assert implementations(models.build("llama", "vivace")) == {"vivace"}
    with pytest.raises((ImportError, ValueError)):
        models.build("llama", "flash_attention_2")
    vivace.transformers.unregister()
    with pytest.raises(ValueError, match="vivace"):
        models.build("llama", "vivace")


def test_a_saved_config_does_not_mention_us(tmp_path):
    vivace.transformers.register()
    model = models.build("bert", "vivace")
    model.save_pretrained(tmp_path)
    assert "vivace" not in (tmp_path / "config.json").read_text().replace(str(tmp_path), "")
    again = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="vivace")
    assert implementations(again) == {"vivace"}


@pytest.mark.gpu
def test_on_the_gpu_auto_takes_half_precision_and_leaves_float32_to_sdpa(caplog):
    choice = vivace.enable("auto")
    assert choice.implementation == "vivace", choice.reason
    half = models.build("llama", None, torch.bfloat16, "cuda")
    assert implementations(half) == {"vivace"}
    half(models.tokens(1, 9, "cuda"))
    assert vivace.attention_kernel().startswith("attention_")
    full = models.build("llama", None, torch.float32, "cuda")
    assert implementations(full) == {"sdpa"}
    full(models.tokens(1, 9, "cuda"))
    assert any("float32" in r.getMessage() for r in caplog.records)
    vivace.enable("flash_attention_2")
    strict = models.build("llama", "flash_attention_2", torch.float32, "cuda")
    with pytest.raises(policy.UnavailableError, match="float32"):
        strict(models.tokens(1, 9, "cuda"))
