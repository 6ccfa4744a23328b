"""Chatterbox's own generate() around an accelerated T3, several texts at once, and tokens as they come."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.chatterbox

TEXTS = ["Hello there, it is a quiet evening.", "Rain.", "Nobody sings, and the river is high tonight."]


@pytest.fixture(params=["english", "multilingual"])
def tts(request, tmp_path):
    from pipelines import make_tts

    return make_tts(tmp_path, request.param)


@pytest.fixture
def options(tts):
    return {"language_id": "en"} if tts.t3.hp.is_multilingual else {}


def heard(tts):
    """The tokens that reached the vocoder since the last look."""
    calls = [tokens for tokens, _ in tts.s3gen.calls]
    tts.s3gen.calls.clear()
    return calls


def limit(tts, tokens):
    """generate() asks for 1000 tokens; the tests for fewer."""
    session = tts.t3.__dict__["inference"].__self__
    real = session.request

    def request(arguments, on_tokens=None):
        return real({**arguments, "max_new_tokens": tokens}, on_tokens)

    session.request = request


def test_generate_is_chatterbox_s_sound(tts, options, loop):
    from vivace import accelerate, restore

    def generate():
        torch.manual_seed(5)
        return tts.generate(TEXTS[0], exaggeration=0.7, cfg_weight=0.4, temperature=0.9, **options)

    t3, hooks = tts.t3, [layer.self_attn._forward_hooks for layer in tts.t3.tfmr.layers]
    real = type(t3).inference

    def short(self, **arguments):
        return real(self, **{**arguments, "max_new_tokens": 30})

    type(t3).inference = short  # the class's, as in Chatterbox; its signature is of no use to accelerate()
    try:
        expected = generate()
    finally:
        type(t3).inference = real
    for hook in hooks:
        hook.clear()
    tokens = heard(tts)
    assert tts.watermarker.calls == 1
    accelerate(tts, **loop)
    inference = t3.inference
    t3.__dict__["inference"] = lambda **arguments: inference(**{**arguments, "max_new_tokens": 30})
    assert torch.equal(generate(), expected)
    assert heard(tts) == tokens and tts.watermarker.calls == 2
    t3.__dict__["inference"] = inference
    restore(tts)


def test_guidance_zero_works(tts, options, loop):
    """As Chatterbox's README recommends; ChatterboxTTS 0.1.7 fails there."""
    from vivace import accelerate, generate_batch, restore

    accelerate(tts, **loop)
    wave = generate_batch(tts, ["Hello there."], cfg_weight=0.0, max_new_tokens=12, **options)[0]
    assert wave.shape[0] == 1 and len(heard(tts)[0]) <= 12
    restore(tts)


def test_a_batch_is_what_one_by_one_gives(tts, options, loop):
    from vivace import accelerate, restore

    accelerate(tts, **loop)
    together = tts.generate_batch(TEXTS, seed=3, max_new_tokens=24, temperature=1.1, **options)
    tokens = heard(tts)
    for index, text in enumerate(TEXTS):
        alone = tts.generate_batch([text], seed=3 + index, max_new_tokens=24, temperature=1.1, **options)
        assert torch.equal(alone[0], together[index])
        assert heard(tts) == [tokens[index]]
    assert tts.watermarker.calls == 2 * len(TEXTS)
    assert tts.generate_batch([], **options) == []
    restore(tts)
    assert not hasattr(tts, "generate_batch") and not hasattr(tts, "stream_tokens")


def test_each_text_can_have_its_options(tts, options, engine):
    from vivace import accelerate, generate_batch, restore

    accelerate(tts)
    mixed = generate_batch(
        tts, TEXTS[:2], seed=3, max_new_tokens=16, temperature=[0.5, 1.3], exaggeration=[0.2, 1.5], **options
    )
    for index, (temperature, exaggeration) in enumerate([(0.5, 0.2), (1.3, 1.5)]):
        alone = generate_batch(
            tts,
            [TEXTS[index]],
            seed=3 + index,
            max_new_tokens=16,
            temperature=temperature,
            exaggeration=exaggeration,
            **options,
        )
        assert torch.equal(alone[0], mixed[index])
    with pytest.raises(ValueError, match="temperature has 3 values, expected 2"):
        generate_batch(tts, TEXTS[:2], temperature=[1, 2, 3], **options)
    restore(tts)


def test_a_voice_s_sample_is_read_once(tts, options, engine):
    from vivace import accelerate, restore

    read = []
    tts.prepare_conditionals = lambda path, exaggeration=0.5: read.append(path)
    accelerate(tts)
    paths = ["a.wav", "a.wav", "b.wav"]
    tts.generate_batch(TEXTS, max_new_tokens=4, audio_prompt_path=paths, **options)
    assert read == ["a.wav", "b.wav"]
    read.clear()
    tts.generate_batch(TEXTS, max_new_tokens=4, audio_prompt_path="c.wav", **options)
    assert read == ["c.wav"]
    restore(tts)


def test_on_tokens_sees_all_and_can_stop(tts, options, loop):
    from vivace import accelerate, generate_batch, restore

    accelerate(tts, **loop)
    seen = {}

    def watch(index, new, tokens, most):
        assert most == 20
        seen.setdefault(index, []).extend(new)
        assert len(seen[index]) == tokens
        return None if index != 1 else tokens < 3

    generate_batch(tts, [TEXTS[0], TEXTS[2]], seed=1, max_new_tokens=20, temperature=1.2, on_tokens=watch, **options)
    sounded = heard(tts)
    for index, tokens in enumerate(sounded):
        # The English pipeline leaves out what is no sound.
        assert [token for token in seen[index] if token < 6561][: len(tokens)] == [t for t in tokens if t < 6561]
    assert len(seen[1]) <= 4  # one more may be under way
    restore(tts)


def test_an_exception_in_on_tokens_ends_the_call_and_no_more(tts, options, loop):
    from vivace import accelerate, generate_batch, restore

    accelerate(tts, **loop)

    def fail(*_):
        raise LookupError("mine")

    with pytest.raises(Exception, match="mine"):
        generate_batch(tts, TEXTS, max_new_tokens=10, on_tokens=fail, **options)
    assert len(generate_batch(tts, TEXTS[:1], max_new_tokens=10, **options)) == 1
    restore(tts)


def test_streamed_tokens_are_those_of_the_whole(tts, options, loop):
    from vivace import accelerate, restore, stream_tokens

    accelerate(tts, **loop)
    torch.manual_seed(8)
    pieces = list(stream_tokens(tts, TEXTS[0], chunk=7, max_new_tokens=30, temperature=0.0, **options))
    assert all(len(piece) == 7 for piece in pieces[:-1]) and 1 <= len(pieces[-1]) <= 7
    limit(tts, 30)
    tts.generate_batch([TEXTS[0]], max_new_tokens=30, temperature=0.0, **options)
    assert [t for piece in pieces for t in piece if t < 6561] == [t for t in heard(tts)[0] if t < 6561]
    restore(tts)


def test_leaving_a_stream_ends_its_request(tts, options, engine):
    from vivace import accelerate, restore, stream_tokens
    from vivace.chatterbox import describe

    accelerate(tts)
    stream = stream_tokens(tts, TEXTS[0], max_new_tokens=900, temperature=1.5, repetition_penalty=1.0, **options)
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 20
    assert describe(tts)["engine"]["running"] == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "vivace-stream"]
    restore(tts)


def test_two_threads_generate(tts, options, loop):
    from vivace import accelerate, generate_batch, restore

    accelerate(tts, **loop)
    expected = [generate_batch(tts, [text], seed=2, max_new_tokens=12, **options)[0] for text in TEXTS]
    found = {}

    def work(index):
        found[index] = generate_batch(tts, [TEXTS[index]], seed=2, max_new_tokens=12, **options)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[index], expected[index]) for index in range(len(TEXTS)))
    restore(tts)


def test_what_is_not_accelerated_or_no_pipeline(tts, options, engine):
    from vivace import accelerate, generate_batch, restore, stream_tokens

    for call in (lambda: generate_batch(tts, ["a"]), lambda: next(stream_tokens(tts, "a"))):
        with pytest.raises(ValueError, match=r"not accelerated: vivace.accelerate"):
            call()
    accelerate(tts)
    with pytest.raises(TypeError, match="this is a T3"):
        generate_batch(tts.t3, ["a"])
    with pytest.raises(TypeError, match="one string"):
        generate_batch(tts, "abc")
    with pytest.raises(TypeError, match="volume"):
        generate_batch(tts, ["abc"], volume=3, **options)
    with pytest.raises(ValueError, match="chunk is 0"):
        stream_tokens(tts, "a", chunk=0)
    restore(tts)


def test_the_documented_way_from_tokens_to_sound(tmp_path, monkeypatch):
    """docs/cpp.md's, with the recorders in place of Chatterbox's vocoder and watermark."""
    from chatterbox.tts import ChatterboxTTS
    from pipelines import make_tts

    page = (Path(__file__).parents[3] / "docs" / "cpp.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "tokens.json" in b)
    tts = make_tts(tmp_path)
    monkeypatch.setattr(ChatterboxTTS, "from_pretrained", lambda device: tts)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": [5, 6561, 7, 8190, 6560]}))
    found = {}
    exec(block, found)
    assert heard(tts) == [[5, 7, 6560]]
    assert tts.watermarker.calls == 1 and found["wav"].shape == (12,)
