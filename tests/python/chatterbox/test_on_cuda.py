"""An accelerated T3 on a GPU, without its pipeline: Chatterbox's tokens, and failures that leave a model that works."""

import contextlib
import gc
import importlib
import logging
import re
import threading

import pytest
import torch

pytestmark = [pytest.mark.chatterbox, pytest.mark.gpu]
TOKENS = 30
TEXT = [255, *range(20, 60), 0]
GREEDY = {"seed": 3, "max_new_tokens": TOKENS, "temperature": 1e-4}


def state(t3):
    """What restore() must bring back; parked values come back to memory of their own."""
    attributes = {name: id(value) for name, value in vars(t3).items() if name not in ("patched_model", "compiled")}
    tensors = {
        name: (id(tensor), tensor.device, tensor.dtype, tensor.shape, float(tensor.detach().double().sum()))
        for name, tensor in (*t3.named_parameters(), *t3.named_buffers())
        if not name.startswith("patched_model.")
    }
    return attributes, tensors, dict(vars(t3.cfg)), {name: type(module) for name, module in t3.named_modules()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(T3 on the GPU, voice, Chatterbox's greedy tokens)."""
    from chatterbox_t3 import build_t3, infer

    from vivace.t3 import preset, write_random_voice

    path = tmp_path_factory.mktemp("voice") / "voice.safetensors"
    voice = {name: tensor.cuda() for name, tensor in write_random_voice(path, 1).items()}
    t3 = build_t3(preset("tiny"), 0).to("cuda")
    with torch.no_grad():
        t3.speech_head.weight[t3.hp.stop_speech_token] = 0  # it would stop at once
    expected = infer(t3, voice, TEXT, **GREEDY)
    assert len(expected) == TOKENS and len(set(expected)) > 5, "the tests would show little"
    return t3, voice, expected


@pytest.fixture(autouse=True)
def put_back(model):
    from vivace.chatterbox import restore

    yield
    restore(model[0])


def infer(t3, voice, **options):
    from chatterbox_t3 import infer

    return infer(t3, voice, TEXT, **{**GREEDY, **options})


@contextlib.contextmanager
def full_gpu():
    """torch's allocator has what it holds, and nothing of it is free."""
    from vivace.chatterbox.errors import OutOfMemory

    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    held, size = [], 1 << 26
    try:
        while size >= 512:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except OutOfMemory:
                size //= 2
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("keep_weights", [False, True])
def test_float32_is_chatterbox_s_greedy_tokens_and_weights_come_back(model, loop, keep_weights):
    from vivace import accelerate, restore

    t3, voice, expected = model
    before = state(t3)
    accelerate(t3, dtype="fp32", keep_weights=keep_weights, **loop)
    ours = t3.__dict__["inference"].__self__.choice.loop != "transformers"
    assert (t3.tfmr.norm.weight.device.type == "cpu") == (ours and not keep_weights)
    assert t3.device.type == "cuda"
    assert infer(t3, voice) == expected
    restore(t3)
    assert state(t3) == before
    assert infer(t3, voice) == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_halves_generate_and_float32_comes_back(model, loop, dtype):
    from vivace import accelerate, restore

    t3, voice, expected = model
    before = state(t3)
    accelerate(t3, dtype=dtype, **loop)
    tokens = infer(t3, voice)
    assert 1 <= len(tokens) <= TOKENS and all(0 <= token < t3.hp.speech_tokens_dict_size for token in tokens)
    restore(t3)
    assert state(t3) == before
    assert infer(t3, voice) == expected


def test_auto_is_the_engine_in_bfloat16_and_the_log_says_so_once(model, engine, caplog):
    from vivace import accelerate, policy, restore
    from vivace.chatterbox import describe

    t3 = model[0]
    policy.forget()
    with caplog.at_level(logging.INFO, "vivace"):
        for _ in range(2):
            accelerate(t3)
            found = describe(t3)
            restore(t3)
    assert (found["loop"], found["attention"], found["dtype"]) == ("engine", "vivace", "bfloat16")
    said = [r for r in caplog.records if "runs on vivace's engine in bfloat16" in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.INFO


def test_sampled_tokens_and_the_generator_are_chatterbox_s(model, engine):
    from vivace import accelerate

    t3, voice, _ = model
    expected = infer(t3, voice, temperature=0.8)
    after = torch.cuda.get_rng_state()
    accelerate(t3, dtype="fp32", rng="torch")
    assert infer(t3, voice, temperature=0.8) == expected
    assert torch.equal(torch.cuda.get_rng_state(), after)


def test_a_t3_on_the_cpu_can_run_on_the_gpu(model, engine):
    from vivace import accelerate, restore

    t3, voice, expected = model
    t3.to("cpu")
    try:
        before = state(t3)
        accelerate(t3, dtype="fp32", device="cuda")
        at_home = {name: tensor.cpu() for name, tensor in voice.items()}
        assert infer(t3, at_home) == expected
        restore(t3)
        assert state(t3) == before
    finally:
        restore(t3)
        t3.to("cuda")


def test_threads_get_what_one_gets(model, loop):
    from chatterbox_t3 import conditionals

    from vivace import accelerate

    t3, voice, expected = model
    accelerate(t3, dtype="fp32", **loop)
    short = torch.tensor([[*TEXT[:20], 0]] * 2)
    texts = [torch.tensor([TEXT] * 2), short]

    def run(i):
        options = {"max_new_tokens": TOKENS, "temperature": 0.0}
        return t3.inference(t3_cond=conditionals(voice, 0.5), text_tokens=texts[i % 2], **options)[0].tolist()

    alone = [run(0), run(1)]
    assert alone[0] == expected
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, run(i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: alone[i % 2] for i in range(6)}


def prepared(t3, voice, **options):
    """Greedy generation with its voice on the GPU already: what is allocated from here on is the loop's."""
    from chatterbox_t3 import conditionals

    cond = conditionals(voice, 0.5)
    options = {"max_new_tokens": TOKENS, "temperature": 0.0, **options}
    return lambda: t3.inference(t3_cond=cond, text_tokens=torch.tensor([TEXT] * 2), **options)[0].tolist()


def test_out_of_memory_while_generating(model, loop):
    """Transformers' cache must grow and so must fail; the engine fails, or has what it needs and is right."""
    from vivace import accelerate
    from vivace.chatterbox.errors import OutOfMemory

    t3, voice, expected = model
    accelerate(t3, dtype="fp32", **loop)
    grows = t3.__dict__["inference"].__self__.choice.loop != "engine"
    for _ in range(2):
        call = prepared(t3, voice)
        with full_gpu():
            try:
                tokens = call()
            except OutOfMemory as error:
                assert re.search("out of memory while generating; the model is usable.*Lower max_requests", str(error))
            else:
                assert tokens == expected and not grows
        assert infer(t3, voice) == expected


def test_out_of_memory_while_the_engine_grows(model, engine):
    from vivace import accelerate
    from vivace.chatterbox.errors import OutOfMemory

    t3, voice, expected = model
    accelerate(t3, dtype="fp32")
    assert infer(t3, voice) == expected
    backend = t3.__dict__["inference"].__self__.backend
    before = backend.capacity
    call = prepared(t3, voice, max_new_tokens=4000)
    with full_gpu(), pytest.raises(OutOfMemory, match=r"no room for the engine.*Lower max_requests or capacity"):
        call()
    assert infer(t3, voice) == expected  # opened as it was
    assert backend.capacity == before


def test_flash_attention_2_is_ours_in_halves_and_an_error_in_float32(model, engine):
    from vivace import accelerate, restore
    from vivace.chatterbox import describe

    t3 = model[0]
    before = state(t3)
    accelerate(t3, implementation="flash_attention_2")
    found = describe(t3)
    assert (found["loop"], found["attention"], found["dtype"]) == ("engine", "vivace", "bfloat16")
    restore(t3)
    with pytest.raises(ValueError, match="flash_attention_2 was asked for, but the tensors are float32"):
        accelerate(t3, implementation="flash_attention_2", dtype="fp32")
    assert state(t3) == before


@pytest.mark.parametrize("keep_weights", [False, True])
def test_out_of_memory_in_accelerate(model, engine, keep_weights):
    from vivace import accelerate
    from vivace.chatterbox.errors import OutOfMemory

    t3, voice, expected = model
    before = state(t3)
    with pytest.raises(OutOfMemory, match=r"no room.*capacity"):
        accelerate(t3, max_requests=40000, capacity=6000, keep_weights=keep_weights)
    assert state(t3) == before
    if keep_weights:  # otherwise the weights that are moved away leave room
        with full_gpu(), pytest.raises(OutOfMemory, match="no room"):
            accelerate(t3, dtype="fp32", keep_weights=True)
        assert state(t3) == before
    assert infer(t3, voice) == expected


def test_a_restore_without_memory_can_be_repeated(model, engine):
    from vivace import accelerate, restore
    from vivace.chatterbox.errors import OutOfMemory

    t3, voice, expected = model
    before = state(t3)
    accelerate(t3)
    session = t3.__dict__["inference"].__self__
    session.backend.close()  # its memory would do for the weights
    with full_gpu(), pytest.raises(OutOfMemory, match="restore: no room for T3's weights"):
        restore(t3)
    restore(t3)
    assert state(t3) == before
    assert infer(t3, voice) == expected


@pytest.mark.parametrize("name", ["load_model", "script", "archive.write", "Engine"])
def test_an_exception_in_accelerate_leaves_the_model_on_the_gpu(model, engine, monkeypatch, name):
    from vivace import accelerate

    t3, voice, expected = model
    before = state(t3)
    owner = importlib.import_module("vivace.chatterbox.engine_backend")
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)

    def fail(*args, **options):
        raise RuntimeError("injected")

    monkeypatch.setattr(owner, last, fail)
    with pytest.raises(RuntimeError, match="injected"):
        accelerate(t3)
    assert state(t3) == before
    assert infer(t3, voice) == expected


def test_memory_comes_back(model, engine):
    from vivace import accelerate, restore

    t3, voice, _ = model

    def held():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def once():
        accelerate(t3)
        infer(t3, voice)
        restore(t3)

    once()
    before = held()
    for _ in range(3):
        once()
    assert held() <= before


def test_a_model_on_two_devices_is_an_error(model):
    from vivace import accelerate

    t3, voice, expected = model
    t3.speech_head.to("cpu")
    try:
        with pytest.raises(ValueError, match=r"T3 is on 2 devices \(cuda:0: \d+ tensors .*; cpu: 1 tensors"):
            accelerate(t3)
    finally:
        t3.speech_head.to("cuda")
    assert infer(t3, voice) == expected


def test_a_model_that_is_moved_while_it_is_accelerated(model, engine):
    from chatterbox_t3 import conditionals

    from vivace import accelerate, restore

    t3, voice, expected = model
    accelerate(t3, dtype="fp32")
    t3.to("cuda")  # as many programs do once more: nothing moves, and the parked weights are not lost
    assert infer(t3, voice) == expected
    t3.to("cpu")
    with pytest.raises(RuntimeError, match=r"moved from cuda:0 to cpu after vivace.accelerate"):
        t3.inference(t3_cond=conditionals(voice, 0.5), text_tokens=torch.tensor([TEXT] * 2), max_new_tokens=3)
    restore(t3)
    t3.to("cuda")
    assert infer(t3, voice) == expected


def test_llama_520m_flash_runs_our_kernel(model, caplog):
    from chatterbox.models.t3 import t3 as chatterbox

    import vivace
    from vivace import policy
    from vivace.bench.chatterbox import sized
    from vivace.chatterbox import register_llama_520m_flash, unregister_llama_520m_flash
    from vivace.t3 import preset

    policy.forget()
    embeds = torch.randn(2, 50, 128, device="cuda", dtype=torch.bfloat16)
    with sized(chatterbox, preset("tiny")), caplog.at_level(logging.INFO, "vivace"):
        standard = chatterbox.T3(chatterbox.T3Config.english_only()).to("cuda", torch.bfloat16).eval()
        register_llama_520m_flash()
        try:
            t3 = chatterbox.T3(chatterbox.T3Config.english_only()).to("cuda", torch.bfloat16).eval()
            assert t3._flash_attention_available()
            assert t3.cfg._attn_implementation == "flash_attention_2"
            t3.load_state_dict(standard.state_dict())
            with torch.no_grad():
                got = t3.tfmr(inputs_embeds=embeds).last_hidden_state
                assert vivace.attention_kernel().startswith("attention_")
                expected = standard.tfmr(inputs_embeds=embeds).last_hidden_state
                full = t3.float().tfmr(inputs_embeds=embeds.float()).last_hidden_state  # on sdpa, and says so
        finally:
            unregister_llama_520m_flash()
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(full.bfloat16(), expected, rtol=3e-2, atol=3e-2)
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("Flash-Attention2 detected: Using optimized configuration") == 1
    assert any("float32" in message and "scaled_dot_product_attention" in message for message in messages)
