"""restore() brings back exactly what was there, also after a failure at any step of accelerate()."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.chatterbox


def snapshot(*objects):
    """Every attribute by identity, module trees, configuration, tensors by identity, place and value."""
    found = {}
    for number, owner in enumerate(objects):
        found[number, "attributes"] = {name: id(value) for name, value in vars(owner).items()}
        if isinstance(owner, nn.Module):
            found[number, "config"] = dict(vars(owner.cfg))
            found[number, "classes"] = {name: type(module) for name, module in owner.named_modules()}
            found[number, "hooks"] = {
                name: (len(module._forward_hooks), len(module._forward_pre_hooks))
                for name, module in owner.named_modules()
            }
            found[number, "tensors"] = {
                name: (id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, float(tensor.sum()))
                for name, tensor in (*owner.named_parameters(), *owner.named_buffers())
            }
        found[number, "methods"] = {name: id(value) for name, value in vars(type(owner)).items()}
    return found


@pytest.fixture(scope="module", params=["english", "multilingual"])
def tts(request, tmp_path_factory):
    from pipelines import make_tts

    return make_tts(tmp_path_factory.mktemp("tts"), request.param)


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    from pipelines import make_tts

    return make_tts(tmp_path_factory.mktemp("english"))


def test_every_attribute_is_back(tts, loop):
    from vivace import accelerate, restore
    from vivace.chatterbox import is_accelerated

    before = snapshot(tts, tts.t3)
    assert accelerate(tts, **loop) is tts
    assert is_accelerated(tts) and is_accelerated(tts.t3)
    assert snapshot(tts, tts.t3) != before
    tts.generate("Hello there.", **({"language_id": "en"} if tts.t3.hp.is_multilingual else {}))
    conds = tts.conds
    assert restore(tts) is tts
    assert tts.conds is conds and not is_accelerated(tts)
    assert snapshot(tts, tts.t3) == before
    restore(tts)  # nothing more to do
    assert snapshot(tts, tts.t3) == before


def test_accelerating_twice_changes_nothing_more(english, loop):
    from vivace import accelerate, restore

    before = snapshot(english, english.t3)
    accelerate(english, **loop)
    once = snapshot(english, english.t3)
    accelerate(english, **loop)
    accelerate(english.t3, **loop)
    assert snapshot(english, english.t3) == once
    restore(english.t3)  # of either
    assert snapshot(english, english.t3) == before


def test_other_options_take_the_place_of_the_first(english, loop):
    from vivace import accelerate, restore
    from vivace.chatterbox import describe

    before = snapshot(english, english.t3)
    accelerate(english, **loop)
    accelerate(english, implementation="eager")
    assert describe(english)["attention"] == "eager"
    restore(english)
    assert snapshot(english, english.t3) == before


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cast_weights_come_back_bit_for_bit(english, dtype):
    from vivace import accelerate, restore
    from vivace.chatterbox import describe

    before = snapshot(english, english.t3)
    accelerate(english, implementation="sdpa", dtype=dtype)
    weight = english.t3.tfmr.layers[0].mlp.up_proj.weight
    assert weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert describe(english)["parked_bytes"] > 0
    assert torch.isfinite(english.generate("Hello.")).all()
    restore(english)
    assert snapshot(english, english.t3) == before


#: What accelerate() calls, one after the other; each fails in turn.
STEPS = [
    ("vivace.chatterbox.accelerate", "choose"),
    ("vivace.chatterbox.accelerate", "config_of"),
    ("vivace.chatterbox.accelerate", "watches_alignment"),
    ("vivace.chatterbox.parking", "Parking.move"),
    ("vivace.chatterbox.engine_backend", "load_model"),
    ("vivace.chatterbox.engine_backend", "make_manifest"),
    ("vivace.chatterbox.engine_backend", "script"),
    ("vivace.chatterbox.engine_backend", "archive.write"),
    ("vivace.chatterbox.engine_backend", "Engine"),
    ("vivace.chatterbox.pipeline", "attach"),
    ("vivace.chatterbox.accelerate", "announce"),
]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("module", "name"), STEPS)
def test_a_failure_at_any_step_leaves_the_model_as_it_was(english, engine, monkeypatch, module, name, error):
    import importlib

    from vivace import accelerate, restore

    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    calls = []

    def fail(*args, **options):
        calls.append(name)
        raise error("injected")

    before = snapshot(english, english.t3)
    monkeypatch.setattr(owner, last, fail)
    with pytest.raises(error, match="injected"):
        accelerate(english)
    assert calls
    if name != "announce":  # by then it is done; the log is not part of it
        assert snapshot(english, english.t3) == before
    monkeypatch.undo()
    accelerate(english)
    restore(english)
    assert snapshot(english, english.t3) == before


@pytest.mark.parametrize("step", range(1, 6))
def test_a_failing_patch_is_taken_back_with_those_before(english, engine, monkeypatch, step):
    from vivace import accelerate
    from vivace.patches import Patches

    before, real, count = snapshot(english, english.t3), Patches.set, iter(range(1, 100))

    def set(self, owner, name, value):
        if next(count) == step:
            raise RuntimeError("injected")
        real(self, owner, name, value)

    monkeypatch.setattr(Patches, "set", set)
    if step < 5:  # the session, inference, generate_batch, stream_tokens
        with pytest.raises(RuntimeError, match="injected"):
            accelerate(english)
    else:
        from vivace import restore

        accelerate(english)
        restore(english)
    assert snapshot(english, english.t3) == before


def test_a_restore_without_memory_can_be_repeated(english, monkeypatch):
    from vivace import accelerate, restore
    from vivace.chatterbox.errors import OutOfMemory
    from vivace.chatterbox.parking import Parking

    before = snapshot(english, english.t3)
    accelerate(english, implementation="sdpa", dtype="bf16")

    def full(self):
        raise OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Parking, "back", full)
    with pytest.raises(OutOfMemory, match="restore: no room for T3's weights"):
        restore(english)
    monkeypatch.undo()
    restore(english)
    assert snapshot(english, english.t3) == before


def test_out_of_memory_in_accelerate(english, engine, monkeypatch):
    from vivace import accelerate
    from vivace.chatterbox import engine_backend
    from vivace.chatterbox.errors import OutOfMemory

    before = snapshot(english, english.t3)

    def engine(*args, **options):
        raise ValueError(
            "vivace.engine: the KV cache needs 9.0 GiB, cuda:0 has 1.0 GiB free; lower capacity or max_requests"
        )

    monkeypatch.setattr(engine_backend, "Engine", engine)
    with pytest.raises(OutOfMemory, match=r"no room.*9.0 GiB.*Lower max_requests or capacity of vivace.accelerate"):
        accelerate(english)
    assert snapshot(english, english.t3) == before


def test_what_is_no_chatterbox_is_named():
    from chatterbox.models.t3.t3 import T3, T3Config

    from vivace import accelerate, restore
    from vivace.chatterbox import is_accelerated

    with pytest.raises(TypeError, match="model is of type Linear, expected a ChatterboxTTS"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is of type str"):
        accelerate("chatterbox")
    hp = T3Config(text_tokens_dict_size=50276)
    hp.llama_config_name, hp.input_pos_emb, hp.speech_tokens_dict_size = "GPT2_medium", None, 6563
    hp.use_perceiver_resampler = hp.emotion_adv = False
    with torch.device("meta"):
        turbo = T3(hp)
    with pytest.raises(ValueError, match=r"GPT2Model.*Turbo or Nano.*only the Llama T3"):
        accelerate(turbo)
    for model in (turbo, nn.Linear(2, 2), "chatterbox"):  # what was never accelerated needs no restoring
        assert restore(model) is model and not is_accelerated(model)


def test_a_model_on_two_devices_or_none_is_an_error(english):
    from vivace import accelerate

    t3 = english.t3
    before, head = snapshot(english, t3), t3.speech_head
    t3.speech_head = nn.Linear(*reversed(head.weight.shape), bias=False, device="meta")
    try:
        with pytest.raises(ValueError, match=r"T3 is on 2 devices \(cpu: \d+ tensors .*; meta: 1 tensors"):
            accelerate(english)
    finally:
        t3.speech_head = head
    assert snapshot(english, t3) == before


def test_options_out_of_range(english):
    from vivace import accelerate

    for options, message in (
        ({"implementation": "flash"}, "wanted is 'flash', expected one of auto, flash_attention_2, sdpa, eager"),
        ({"dtype": "int8"}, "dtype is int8"),
        ({"rng": "numpy"}, "rng is 'numpy'"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"capacity": -5}, "capacity is -5"),
        ({"device": "mars"}, "mars"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            accelerate(english, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash_attention_2 can be here")
def test_flash_attention_2_without_a_gpu_is_an_error_that_says_why(english):
    from vivace import accelerate

    before = snapshot(english, english.t3)
    with pytest.raises(ValueError, match=r"flash_attention_2 was asked for, but .*GPU"):
        accelerate(english, implementation="flash_attention_2")
    assert snapshot(english, english.t3) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash_attention_2 can be here")
def test_options_that_cannot_be_leave_an_accelerated_model_accelerated(english, loop):
    from vivace import accelerate, restore

    before = snapshot(english, english.t3)
    accelerate(english, **loop)
    once = snapshot(english, english.t3)
    for options in ({"implementation": "flash_attention_2"}, {"dtype": "int8"}, {"rng": "numpy"}, {"device": "mars"}):
        with pytest.raises((ValueError, RuntimeError)):
            accelerate(english, **options)
        assert snapshot(english, english.t3) == once
    assert torch.isfinite(english.generate("Hello.")).all()
    restore(english)
    assert snapshot(english, english.t3) == before


@pytest.mark.parametrize(
    ("break_it", "loop", "reason"),
    [
        ("library", "transformers", "the operators do not load: another torch"),
        ("engine", "operators", "the engine does not load: for torch 9"),
    ],
)
def test_a_fall_back_works_and_says_why_once(tts, monkeypatch, caplog, break_it, loop, reason):
    from vivace import accelerate, extension, library, policy, restore
    from vivace.chatterbox import describe

    if break_it == "library":
        monkeypatch.setattr(library, "unavailable_reason", lambda: "another torch")
    else:

        def load():
            raise ImportError("for torch 9")

        monkeypatch.setattr(extension, "load", load)
    policy.forget()
    with caplog.at_level(logging.INFO, "vivace"):
        for _ in range(2):
            accelerate(tts)
            assert describe(tts)["loop"] == loop
            tts.generate("Hello.", **({"language_id": "en"} if tts.t3.hp.is_multilingual else {}))
            restore(tts)
    said = [record for record in caplog.records if reason in record.message]
    assert len(said) == 1 and said[0].levelno == logging.WARNING
    policy.forget()


@pytest.mark.parametrize("device", ["mps", "cuda:0"])
def test_gpus_that_are_not_ours_stay_on_sdpa(monkeypatch, device):
    """Apple's, AMD's and old ones: the weights' own dtype, transformers' sdpa, and why."""
    from vivace import policy
    from vivace.chatterbox.choice import choose

    monkeypatch.setattr(policy, "why_not", lambda *args, **options: "the GPU is of another make")
    choice = choose(torch.device(device), torch.float32, "auto", "auto")
    assert choice == ("transformers", "sdpa", torch.float32, "the GPU is of another make")


def test_an_accelerated_model_is_freed(tmp_path, engine):
    from pipelines import make_tts

    from vivace import accelerate

    tts = make_tts(tmp_path)
    accelerate(tts)
    tts.generate("Hello.")
    gone = weakref.ref(tts.t3)
    del tts
    gc.collect()
    assert gone() is None
