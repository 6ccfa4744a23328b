"""vivace.generate and vivace.Engine."""

import subprocess
import sys
import threading

import pytest
import torch

import vivace
from vivace import extension as extension_module
from vivace.engine import GenerationError

TEXT = "Hello there, this is a test."


@pytest.fixture(scope="module")
def extension():
    try:
        return extension_module.load()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(extension, assets):
    with vivace.Engine(assets.model, tokenizer=assets.tokenizer, device="cpu", max_requests=2, capacity=512) as engine:
        yield engine


def test_generate_gives_what_the_executable_gives(extension, assets, generate):
    import json

    result = vivace.generate(
        assets.model, TEXT, tokenizer=assets.tokenizer, voice=assets.voice, seed=7, max_tokens=15, device="cpu"
    )
    done = generate("--text", TEXT, "--seed", "7", "--max-tokens", "15")
    assert result.tokens == json.loads(done.stdout)["tokens"]
    assert result.finish_reason in ("stop", "length")
    assert result.seconds > 0


def test_a_list_of_texts_gives_a_list_of_results(extension, assets):
    texts = ["One.", "Two, and a little more.", "Three?"]
    options = {"tokenizer": assets.tokenizer, "voice": assets.voice, "max_tokens": 8, "device": "cpu"}
    results = vivace.generate(assets.model, texts, seed=3, batch=2, **options)
    assert [result.tokens for result in results] == [
        vivace.generate(assets.model, text, seed=3 + i, **options).tokens for i, text in enumerate(texts)
    ]
    assert vivace.generate(assets.model, [], **options) == []


def test_engine_streams_and_stops_when_the_callback_says_so(engine, assets):
    seen = []

    def on_tokens(id, new_tokens, so_far, max_tokens):
        seen.extend(new_tokens)
        assert so_far == len(seen)
        return so_far < 5

    id = engine.submit(TEXT, voice=assets.voice, temperature=100.0, min_p=0.0, on_tokens=on_tokens, max_tokens=200)
    result = engine.wait(id)
    assert result.tokens == seen
    assert len(seen) == 5
    assert result.finish_reason == "cancelled"


def test_a_callback_that_raises_fails_its_request(engine, assets):
    def on_tokens(*_):
        raise KeyError("lost")

    with pytest.raises(GenerationError, match="KeyError"):
        engine.wait(engine.submit(TEXT, voice=assets.voice, max_tokens=20, on_tokens=on_tokens))
    assert len(engine.wait(engine.submit(TEXT, voice=assets.voice, max_tokens=3)).tokens) <= 3


def test_cancel_and_poll(engine, assets):
    started = threading.Event()
    id = engine.submit(
        TEXT,
        voice=assets.voice,
        temperature=100.0,
        min_p=0.0,
        max_tokens=400,
        on_tokens=lambda *_: started.set(),
    )
    assert started.wait(30)
    assert engine.poll(id).finish_reason in ("", "length")
    engine.cancel(id)
    assert engine.wait(id).finish_reason in ("cancelled", "length")
    with pytest.raises(ValueError, match="there is no request"):
        engine.wait(id)


def test_errors_are_python_exceptions_that_name_the_argument(extension, engine, assets, tmp_path):
    with pytest.raises(ValueError, match="top_p is 7"):
        engine.submit(TEXT, voice=assets.voice, top_p=7)
    with pytest.raises(ValueError, match="capacity of 512"):
        engine.submit(text_tokens=[5] * 500, voice=assets.voice, max_tokens=1)
    with pytest.raises(ValueError, match=r"rng is .*expected philox or torch"):
        engine.submit(TEXT, voice=assets.voice, rng="dice")
    with pytest.raises(ValueError, match="either text or text_tokens"):
        engine.submit(voice=assets.voice)
    with pytest.raises(OSError, match=r"t3\.vivace"):
        engine.submit(TEXT, voice=assets.model)
    with pytest.raises(OSError, match=r"none\.vivace"):
        vivace.Engine(tmp_path / "none.vivace")
    closed = vivace.Engine(assets.model, device="cpu", max_requests=1, capacity=64)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.stats()


def test_texts_and_token_ids_of_other_types(engine, assets):
    ids = engine.tokenize(TEXT)

    def tokens(given):
        return engine.wait(engine.submit(text_tokens=given, voice=assets.voice, max_tokens=5)).tokens

    expected = tokens(ids)
    assert tokens(torch.tensor(ids)) == tokens(tuple(ids)) == expected
    options = {"voice": assets.voice, "max_tokens": 5, "device": torch.device("cpu"), "dtype": torch.float32}
    assert vivace.generate(assets.model, text_tokens=torch.tensor(ids), **options).tokens == expected
    several = vivace.generate(assets.model, text_tokens=[torch.tensor(ids), ids[:2]], **options)
    assert [len(several), several[0].tokens] == [2, expected]
    for given in ([ids], torch.tensor([ids]), ["a"], [1.5]):
        with pytest.raises(TypeError, match=r"vivace\.submit: text_tokens has a (list|str|float), expected integers"):
            tokens(given)
    for text in (5, b"bytes", None):
        with pytest.raises(TypeError, match=r"a text is of type (int|bytes|NoneType), expected str"):
            engine.tokenize(text)
        with pytest.raises(TypeError, match=r"a text is of type (int|bytes|NoneType), expected str"):
            vivace.generate(assets.model, [text], tokenizer=assets.tokenizer, voice=assets.voice)
    with pytest.raises(TypeError, match="a text is of type int, expected str"):
        vivace.generate(assets.model, 5, tokenizer=assets.tokenizer, voice=assets.voice)


def test_a_full_cache_row_ends_its_request_with_the_reason(engine, assets):
    result = engine.wait(
        engine.submit(TEXT, voice=assets.voice, temperature=100.0, min_p=0.0, max_tokens=4000, ignore_stop=True)
    )
    assert result.finish_reason == "length"
    assert result.prompt_tokens + len(result.tokens) == 512
    assert "capacity is 512 positions" in result.detail


def test_a_voice_may_be_made_from_its_parts(engine, assets):
    from safetensors.numpy import load_file

    parts = load_file(assets.voice)
    speaker, prompt = parts["t3.speaker_emb"][0], parts["t3.cond_prompt_speech_tokens"][0]
    expected = engine.wait(engine.submit(TEXT, voice=assets.voice, max_tokens=8)).tokens
    made = engine.make_voice(speaker.tolist(), prompt.tolist())
    assert engine.wait(engine.submit(TEXT, voice=made, max_tokens=8)).tokens == expected
    longer = engine.make_voice(speaker.tolist(), prompt.tolist() * 3)
    assert len(engine.wait(engine.submit(TEXT, voice=longer, max_tokens=8, ignore_stop=True)).tokens) == 8
    with pytest.raises(ValueError, match="speaker_emb has 3 numbers"):
        engine.make_voice([0.0] * 3, [1])
    with pytest.raises(ValueError, match=r"prompt_tokens\[1\] is 99999"):
        engine.make_voice(speaker.tolist(), [1, 99999])
    with pytest.raises(ValueError, match="prompt_tokens has 0 tokens"):
        engine.make_voice(speaker.tolist(), [])


def test_a_torch_generator_goes_on_from_the_state_it_is_given(engine, assets):
    def tokens(**options):
        return engine.wait(engine.submit(TEXT, voice=assets.voice, rng="torch", max_tokens=12, **options)).tokens

    state = bytes(torch.Generator().manual_seed(5).get_state().tolist())
    assert tokens(seed=99, generator_state=state) == tokens(seed=5) != tokens(seed=99)
    with pytest.raises(ValueError, match="generator_state is no state of a generator of cpu"):
        engine.submit(TEXT, voice=assets.voice, rng="torch", generator_state=b"1234")


def test_fused_steps_give_the_tokens_of_steps_layer_by_layer(extension, assets):
    tokens, options = [], {"tokenizer": assets.tokenizer, "device": "cpu", "max_requests": 1, "capacity": 256}
    for fused in ("off", "on"):
        with vivace.Engine(assets.model, fused_step=fused, **options) as one:
            tokens.append(one.wait(one.submit(TEXT, voice=assets.voice, max_tokens=20)).tokens)
            stats = one.stats()
            assert stats["fused_steps"] == (stats["decode_steps"] if fused == "on" else 0)
            assert bool(stats["not_fused"]) == (fused == "off")
    assert tokens[0] == tokens[1]
    with pytest.raises(ValueError, match="fused_step is"):
        vivace.Engine(assets.model, fused_step="sometimes", **options)


def test_stats_count_tokens(engine, assets):
    before = engine.stats()
    result = engine.wait(engine.submit(TEXT, voice=assets.voice, max_tokens=6))
    after = engine.stats()
    assert after["generated_tokens"] - before["generated_tokens"] == len(result.tokens)
    assert after["finished"] - before["finished"] == 1
    assert after["queued"] == after["running"] == 0


def test_an_engine_that_is_busy_at_exit_does_not_hang(extension, assets):
    program = f"""
import vivace
engine = vivace.Engine({str(assets.model)!r}, tokenizer={str(assets.tokenizer)!r}, device="cpu", max_requests=1)
engine.submit("Hello.", voice={str(assets.voice)!r}, temperature=100.0, min_p=0.0, on_tokens=lambda *_: None)
print("submitted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "submitted\n"


def test_an_extension_for_another_torch_is_refused_with_both_versions(extension, monkeypatch):
    monkeypatch.delitem(sys.modules, "vivace._C")
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with pytest.raises(ImportError, match=r"was built for torch 2\..*this is torch 9\.9\.0"):
        extension_module.load()


def test_a_missing_extension_is_an_import_error_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("VIVACE_EXTENSION_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, "vivace._C", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        extension_module.load()
