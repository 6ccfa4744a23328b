"""accelerate() gives Chatterbox's tokens, whatever runs them."""

import copy
import pickle
import threading

import pytest
import torch

pytestmark = pytest.mark.chatterbox

CASES = {
    "defaults": {},
    "greedy": {"temperature": 1e-4},
    "another guidance, top-p": {"cfg_weight": 0.3, "top_p": 0.8},
    "hot, min-p, penalty": {"min_p": 0.2, "temperature": 1.3, "repetition_penalty": 2.0},
    "no guidance": {"cfg_weight": 0.0},
    "excited": {"exaggeration": 20.0},
    "temperature 1, no filters": {"temperature": 1.0, "min_p": 0.0, "top_p": 1.0, "repetition_penalty": 1.0},
}
TOKENS = 40


@pytest.fixture(scope="module", params=["english", "multilingual"])
def reference(request, tmp_path_factory):
    """(T3, voice, text, {case: (Chatterbox's tokens, the state of torch's generator afterwards)})."""
    from chatterbox_t3 import build_t3, infer

    from vivace.t3 import preset, write_random_voice

    voice = write_random_voice(tmp_path_factory.mktemp("voice") / "voice.safetensors", 1)
    t3 = build_t3(preset("tiny", request.param), 0)
    text = [255, *(1 + ord(letter) % 250 for letter in "Hello there, it is a quiet evening."), 0]
    expected = {}
    for name, options in CASES.items():
        tokens = infer(t3, voice, text, seed=7, max_new_tokens=TOKENS, **options)
        expected[name] = tokens, torch.get_rng_state()
    lengths = {len(tokens) for tokens, _ in expected.values()}
    assert max(lengths) > 1, "the model stops at once: the test would show nothing"
    for layer in t3.tfmr.layers:
        layer.self_attn._forward_hooks.clear()
    return t3, voice, text, expected


@pytest.fixture
def accelerated(reference, loop):
    from vivace.chatterbox import accelerate, restore

    t3 = reference[0]
    accelerate(t3, **loop)
    yield reference
    restore(t3)


def infer(t3, voice, text, *, rows=2, exaggeration=0.5, **options):
    from chatterbox_t3 import conditionals

    options = {"max_new_tokens": TOKENS, **options}
    out = t3.inference(t3_cond=conditionals(voice, exaggeration), text_tokens=torch.tensor([text] * rows), **options)
    assert out.dtype == torch.long and out.dim() == 2 and out.size(0) == 1
    return out[0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_generator_are_those_of_chatterbox(accelerated, case):
    t3, voice, text, expected = accelerated
    torch.manual_seed(7)
    tokens, state = expected[case]
    assert infer(t3, voice, text, **CASES[case]) == tokens
    assert torch.equal(torch.get_rng_state(), state), "what draws next, S3Gen, would sound different"


def test_temperature_zero_is_greedy(accelerated):
    t3, voice, text, expected = accelerated
    assert infer(t3, voice, text, temperature=0) == expected["greedy"][0]
    assert infer(t3, voice, text, temperature=0.7, do_sample=False) == expected["greedy"][0]


class Bar:
    """What stands where Chatterbox's module has tqdm."""

    def __init__(self, steps, desc, **options):
        self.steps, self.desc, self.seen, self.closed = list(steps), desc, [], False
        bars.append(self)

    def update(self, more):
        self.seen.append(more)

    def close(self):
        self.closed = True


bars: list[Bar] = []


def test_chatterbox_s_progress_bar_goes_on(accelerated, monkeypatch):
    import sys

    t3, voice, text, expected = accelerated
    monkeypatch.setattr(sys.modules[type(t3).__module__], "tqdm", Bar)
    bars.clear()
    tokens = infer(t3, voice, text, temperature=0)
    assert tokens == expected["greedy"][0]
    stop = int(tokens[-1] == t3.hp.stop_speech_token)
    (bar,) = bars
    assert (bar.desc, len(bar.steps), sum(bar.seen), bar.closed) == ("Sampling", TOKENS, len(tokens) - stop, True)

    def fail(self, more):
        raise BrokenPipeError("nobody looks at it")

    monkeypatch.setattr(Bar, "update", fail)
    with pytest.raises(BrokenPipeError, match="nobody looks"):
        infer(t3, voice, text, temperature=0)
    assert bars[1].closed
    monkeypatch.undo()
    assert infer(t3, voice, text, temperature=0) == tokens


def test_one_row_of_text_without_guidance(accelerated):
    """ChatterboxTTS.generate(cfg_weight=0) gives T3 one row, and Chatterbox 0.1.7 fails there."""
    t3, voice, text, expected = accelerated
    torch.manual_seed(7)
    assert infer(t3, voice, text, rows=1, cfg_weight=0.0) == expected["no guidance"][0]


def test_one_row_of_text_with_guidance(accelerated):
    t3, voice, text, expected = accelerated
    torch.manual_seed(7)
    assert infer(t3, voice, text, rows=1) == expected["defaults"][0]


def test_two_threads_get_what_one_gets(accelerated):
    t3, voice, text, expected = accelerated
    found = {}

    def work(name):
        found[name] = infer(t3, voice, text if name % 2 else [*text[:20], 0], temperature=0)

    short = infer(t3, voice, [*text[:20], 0], temperature=0)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    greedy = expected["greedy"][0]
    assert found == {i: greedy if i % 2 else short for i in range(6)}


def test_a_restore_by_another_thread_is_an_error_or_waits(reference, loop):
    from vivace.chatterbox import accelerate, describe, restore

    t3, voice, text, _ = reference
    options = {"temperature": 0, "stop_on_eos": False, "max_new_tokens": 400}
    accelerate(t3, **loop)
    expected = infer(t3, voice, text, **options)
    started, found = threading.Event(), []
    session = t3.__dict__["inference"].__self__
    submit = session.backend.generate
    session.backend.generate = lambda requests: (started.set(), submit(requests))[1]

    def work():
        try:
            found.append(infer(t3, voice, text, **options))
        except RuntimeError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait(60)
    running = describe(t3)["loop"]
    restore(t3)
    for thread in threads:
        thread.join(120)
    restored = "vivace: this T3 was restored while it was in use"
    assert len(found) == 2 and all(result in (expected, restored) for result in found), (running, found)


def test_positional_and_keyword_errors_are_python_s(accelerated):
    t3, _, text, _ = accelerated
    with pytest.raises(TypeError, match="t3_cond"):
        t3.inference(text_tokens=torch.tensor([text]))
    with pytest.raises(TypeError, match="speed"):
        t3.inference(t3_cond=None, text_tokens=torch.tensor([text]), speed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1.0, expected 0.0 to"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 5000}, "max_new_tokens is 5000, expected 1 to 4096"),
        ({"num_return_sequences": 3}, "num_return_sequences is not supported"),
        ({"initial_speech_tokens": torch.tensor([[5]])}, "initial_speech_tokens is not supported"),
        ({"prepend_prompt_speech_tokens": torch.tensor([[5]])}, "prepend_prompt_speech_tokens is not supported"),
    ],
)
def test_what_cannot_be_is_said(accelerated, options, message):
    t3, voice, text, expected = accelerated
    with pytest.raises(ValueError, match=message):
        infer(t3, voice, text, **options)
    assert infer(t3, voice, text, temperature=0) == expected["greedy"][0]  # and the model still works


def test_bad_voices_and_texts_are_said(accelerated):
    from chatterbox_t3 import conditionals

    t3, voice, text, _ = accelerated

    def run(tokens=text, **fields):
        cond = conditionals(voice, 0.5)
        for name, value in fields.items():
            setattr(cond, name, value)
        return t3.inference(t3_cond=cond, text_tokens=torch.as_tensor(tokens), max_new_tokens=4)

    with pytest.raises(ValueError, match="no start_text_token"):
        run(text[1:])
    with pytest.raises(ValueError, match=r"text_tokens is torch.int64 \[3, "):
        run([text] * 3)
    if t3.__dict__["inference"].__self__.choice.loop == "transformers":
        return  # T3's own modules look at the voice
    with pytest.raises(ValueError, match=r"speaker_emb is torch.float32 .*expected 256 values"):
        run(speaker_emb=torch.zeros(2, 256))
    with pytest.raises(ValueError, match="cond_prompt_speech_tokens is None"):
        run(cond_prompt_speech_tokens=None)
    with pytest.raises(ValueError, match="emotion_adv is None"):
        run(emotion_adv=None)


def test_a_prompt_longer_than_chatterbox_s(accelerated):
    t3, voice, text, _ = accelerated
    longer = {**voice, "t3.cond_prompt_speech_tokens": torch.arange(400)[None]}
    assert len(infer(t3, longer, text, max_new_tokens=3)) >= 1


def test_copies_are_refused(accelerated):
    t3 = accelerated[0]
    with pytest.raises(TypeError, match="accelerated and cannot be copied"):
        copy.deepcopy(t3)
    with pytest.raises(TypeError, match="accelerated and cannot be copied"):
        pickle.dumps(vars(t3)["inference"].__self__)


def test_the_engine_grows_for_what_does_not_fit(reference, engine):
    from vivace.chatterbox import accelerate, describe, restore

    t3, voice, text, expected = reference
    accelerate(t3)
    backend = t3.__dict__["inference"].__self__.backend
    backend._drop()
    backend._open(64, 1)
    assert infer(t3, voice, text, temperature=0) == expected["greedy"][0]
    assert backend.capacity >= len(text) + TOKENS
    restore(t3)
    accelerate(t3, capacity=64)
    with pytest.raises(ValueError, match=r"KV cache.* a capacity of 64"):
        infer(t3, voice, text)
    assert describe(t3)["loop"] == "engine"
    restore(t3)


def test_an_engine_without_memory_says_so_and_goes_on(reference, engine, monkeypatch):
    from vivace.chatterbox import accelerate, restore
    from vivace.chatterbox.errors import OutOfMemory
    from vivace.engine import Engine, GenerationError

    t3, voice, text, expected = reference
    accelerate(t3)
    real = Engine.wait

    def wait(self, id, timeout=None):
        real(self, id, timeout)
        raise GenerationError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(Engine, "wait", wait)
    with pytest.raises(OutOfMemory, match=r"the model is usable.*Tried to allocate.*Lower max_requests"):
        infer(t3, voice, text)
    monkeypatch.undo()
    assert infer(t3, voice, text, temperature=0) == expected["greedy"][0]
    # Growing fails for lack of memory: the next request has the engine as it was.
    backend = t3.__dict__["inference"].__self__.backend
    before = backend.capacity
    from vivace.chatterbox import engine_backend

    def no_memory(*args, **options):
        raise OSError("/proc/1/fd/3: CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(engine_backend, "Engine", no_memory)
    with pytest.raises(OutOfMemory, match="no room for the engine"):
        infer(t3, voice, text, max_new_tokens=3000)
    monkeypatch.undo()
    assert infer(t3, voice, text, temperature=0) == expected["greedy"][0]
    assert backend.capacity == before
    restore(t3)


def test_draws_go_on_where_the_last_call_ended(reference, engine):
    """Without a new torch.manual_seed."""
    from chatterbox_t3 import conditionals
    from chatterbox_t3 import infer as chatterbox_infer

    from vivace.chatterbox import accelerate, restore

    t3, voice, text, _ = reference
    chatterbox_infer(t3, voice, text, seed=3, max_new_tokens=5)
    second = t3.inference(
        t3_cond=conditionals(voice, 0.5), text_tokens=torch.tensor([text, text]), max_new_tokens=TOKENS
    )[0].tolist()
    for layer in t3.tfmr.layers:
        layer.self_attn._forward_hooks.clear()
    accelerate(t3)
    torch.manual_seed(3)
    infer(t3, voice, text, max_new_tokens=5)
    assert infer(t3, voice, text) == second
    restore(t3)


def test_philox_follows_torch_s_seed(reference, engine):
    from vivace.chatterbox import accelerate, restore

    t3, voice, text, _ = reference
    accelerate(t3, rng="philox")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(infer(t3, voice, text, temperature=1.3))
    restore(t3)
    assert runs[0] == runs[1] != runs[2]
