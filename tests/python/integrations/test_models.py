"""Models of transformers on our attention give what they give on eager attention."""

from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
import transformers
from models import VERSION

from vivace.transformers import attention

pytestmark = pytest.mark.usefixtures("registered")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def assert_as_good_as_eager(ours, eager, truth):
    """In float32: equal but for rounding. In 16 bits: our error against float32 is at most twice eager's, and one
    unit.
    """
    if eager.dtype == torch.float32:
        return torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    error = (ours.float() - truth).abs().max()
    unit = torch.finfo(eager.dtype).eps * truth.abs().max()
    assert error <= 2 * (eager.float() - truth).abs().max() + unit


def three(name, dtype, device):
    """(eager in float32, eager, ours), equal weights."""
    eager, ours = models.pair(name, dtype, device)
    truth = models.build(name, "eager", torch.float32, device, eager.state_dict())
    return truth, eager, ours


@pytest.mark.parametrize("name", [*models.CAUSAL, "bert", "whisper"])
def test_every_attention_layer_is_ours_and_says_so(name, registered, device, monkeypatch):
    dtype = torch.bfloat16
    model = models.build(name, "vivace", dtype, device)
    layers = registered.explain(model)
    assert len(layers) == (6 if name == "whisper" else 2)
    assert {entry["implementation"] for entry in layers} == {"vivace"}, layers
    calls = []
    kept = attention._Call.ours
    monkeypatch.setattr(attention._Call, "ours", lambda self: calls.append(1) or kept(self))
    ids = models.tokens(1, 5, device)
    with torch.no_grad():
        if name == "whisper":
            model(torch.randn(1, 8, 64, device=device, dtype=dtype), decoder_input_ids=ids)
        else:
            model(ids)
    assert len(calls) == len(layers)


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["whole", "left", "right"])
@pytest.mark.parametrize("name", models.CAUSAL)
def test_a_causal_model_agrees_with_eager(name, side, dtype, device):
    trio = three(name, DTYPES[dtype], device)
    ids = models.tokens(3, 19, device)
    options, real = {}, torch.ones_like(ids, dtype=torch.bool)
    if side != "whole":
        mask = models.padding(3, 19, side, device)
        options, real = {"attention_mask": mask, "position_ids": positions_of(mask)}, mask.bool()
    truth, eager, ours = (logits(model, ids, **options)[real] for model in trio)
    assert_as_good_as_eager(ours, eager, truth)


@pytest.mark.parametrize("runs", ["ours", "torch"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["whole", "left"])
@pytest.mark.parametrize("name", models.CAUSAL)
def test_decoding_over_a_cache_agrees_with_eager(name, side, cache, runs, device, monkeypatch):
    if runs == "torch":  # what float32 gets on a GPU: torch's attention, told by the same plans
        monkeypatch.setattr("vivace.transformers.attention._why_not_here", lambda *args: "the test says so")
    tuples = name == "gpt2" and VERSION < (4, 48)  # a cache of tuples, before GPT-2 had cache objects
    if cache == "static" and (tuples or (name == "gemma2" and VERSION < (4, 48))):
        pytest.skip(f"{name} takes no StaticCache in transformers {transformers.__version__}")
    eager, ours = models.pair(name, device=device)
    ids = models.tokens(2, 14, device)
    mask = models.padding(2, 14, side, device) if side == "left" else torch.ones_like(ids)
    results = []
    for model in (eager, ours):
        past = models.static_cache(model, 2, 24, device) if cache == "static" else transformers.DynamicCache()
        past = None if tuples else past
        steps, seen = [], 0
        for length in (6, 3, 1, 1, 1, 1, 1):
            part = slice(seen, seen + length)
            options = {"attention_mask": mask[:, : seen + length], "position_ids": positions_of(mask)[:, part]}
            if VERSION < (5, 0) and not tuples:
                options["cache_position"] = torch.arange(seen, seen + length, device=device)
            with torch.no_grad():
                out = model(ids[:, part], past_key_values=past, use_cache=True, **options)
            past = out.past_key_values
            steps.append(out.logits[mask[:, part].bool()])
            seen += length
        results.append(torch.cat(steps))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", models.CAUSAL)
def test_generate_gives_the_same_tokens(name, cache, device):
    eager, ours = models.pair(name, device=device)
    ids, mask = models.tokens(2, 9, device), models.padding(2, 9, "left", device)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    if cache is not None:
        if VERSION < (4, 48):
            if name == "gpt2":
                pytest.skip(f"gpt2 takes no StaticCache in transformers {transformers.__version__}")
            cache = "hybrid" if name == "gemma2" else cache
        options["cache_implementation"] = cache
        if VERSION >= (4, 57):
            options["disable_compile"] = True
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_four_dimensions_is_followed(name, kind, device):
    if name == "gpt2" and VERSION < (4, 48):
        pytest.skip(f"gpt2 takes masks of two dimensions in transformers {transformers.__version__}")
    eager, ours = models.pair(name, device=device)
    ids = models.tokens(2, 12, device)
    visible = torch.ones(2, 1, 12, 12, dtype=torch.bool, device=device).tril()
    visible[:, :, :, 3] = False
    visible[:, :, 3, 3] = True
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    expected = logits(eager, ids, attention_mask=additive)
    given = visible if kind == "bool" else additive
    if kind == "bool" and VERSION < (5, 0):
        pytest.skip("transformers 4 takes masks of four dimensions as floats")
    torch.testing.assert_close(logits(ours, ids, attention_mask=given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models.CAUSAL)
def test_packed_sequences_do_not_see_each_other(name, device):
    if name == "gpt2" and VERSION < (4, 48):
        pytest.skip(f"gpt2 takes masks of two dimensions in transformers {transformers.__version__}")
    _, ours = models.pair(name, device=device)
    lengths = 5, 9, 2, 8
    ids = models.tokens(1, sum(lengths), device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    expected = torch.cat([logits(ours, part) for part in ids.split(lengths, dim=1)], dim=1)
    if VERSION >= (4, 53):
        packed = logits(ours, ids, position_ids=positions, use_cache=False)
    else:  # no detection in this version: the caller says it by a mask
        mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().to(device)[None, None]
        mask = torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)
        if name == "mistral":  # its window is part of the mask that the model makes
            index = torch.arange(sum(lengths), device=device)
            mask = mask.masked_fill(index[:, None] - index >= 7, torch.finfo(torch.float32).min)
        packed = logits(ours, ids, position_ids=positions, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["whole", "left", "right"])
def test_bert_agrees_with_eager(side, dtype, device):
    trio = three("bert", DTYPES[dtype], device)
    ids = models.tokens(3, 17, device)
    mask = torch.ones_like(ids) if side == "whole" else models.padding(3, 17, side, device)
    with torch.no_grad():
        truth, eager, ours = (m(ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in trio)
    assert_as_good_as_eager(ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whisper_agrees_with_eager(dtype, device):
    trio = three("whisper", DTYPES[dtype], device)
    features = torch.randn(2, 8, 64, device=device)
    ids, mask = models.tokens(2, 11, device), models.padding(2, 11, "right", device)
    results = []
    for model in trio:
        with torch.no_grad():
            out = model(features.to(model.dtype), decoder_input_ids=ids, decoder_attention_mask=mask)
        results.append(out.logits[mask.bool()])
    truth, eager, ours = results
    assert_as_good_as_eager(ours, eager, truth)


def test_whisper_generates_the_same_tokens(device):
    eager, ours = models.pair("whisper", device=device)
    features = torch.randn(2, 8, 64, device=device)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 96}
    generated = [
        super(type(m), m).generate(
            features, decoder_input_ids=torch.ones(2, 1, dtype=torch.int64, device=device), **options
        )
        for m in (eager, ours)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("side", ["whole", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_attention_probabilities_come_from_plain_torch_and_that_is_said_once(name, side, device, caplog):
    eager, ours = models.pair(name, device=device)
    ids = models.tokens(2, 9, device)
    mask = torch.ones_like(ids) if side == "whole" else models.padding(2, 9, "left", device)
    caplog.clear()
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask, output_attentions=True)
        for _ in range(2):
            result = ours(ids, attention_mask=mask, output_attentions=True)
    assert len(result.attentions) == 2
    real = mask.bool()
    for got, wanted in zip(result.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(got.transpose(1, 2)[real], wanted.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
    if VERSION >= (4, 54) and not (name == "bert" and VERSION < (5, 0)):
        said = [r for r in caplog.records if "probabilities were asked for" in r.getMessage()]
        assert len(said) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["whole", "left", "right"])
@pytest.mark.parametrize("name", [*models.CAUSAL, "bert"])
def test_gradients_agree_with_eager(name, side, dtype, device):
    trio = three(name, DTYPES[dtype], device)
    ids = models.tokens(3, 15, device)
    mask = torch.ones_like(ids) if side == "whole" else models.padding(3, 15, side, device)
    options = {} if name == "bert" else {"position_ids": positions_of(mask)}
    weights = None
    grads = []
    for model in trio:
        out = (
            model(ids, attention_mask=mask, use_cache=False, **options)
            if name != "bert"
            else model(ids, attention_mask=mask)
        )
        values = (out.last_hidden_state if name == "bert" else out.logits)[mask.bool()]
        weights = torch.randn_like(values) if weights is None else weights
        (values * weights.to(values.dtype)).sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    truth, eager, ours = grads
    assert eager.keys() == ours.keys() and len(ours) > 10
    largest = max(grad.norm() for grad in truth.values())
    for key in eager:
        assert torch.isfinite(ours[key]).all()
        error, theirs = (((grads[key].float() - truth[key]).norm()) for grads in (ours, eager))
        # Some gradients are 0 but for rounding: of a key's bias, which the softmax does not see.
        units = 64 if dtype == "fp32" else 1  # in float32 eager is the truth, with an error of its own
        unit = units * torch.finfo(DTYPES[dtype]).eps * (4 * truth[key].norm() + largest / 4)
        assert error <= 2 * theirs + unit, f"{key}: {error:.3e}, eager {theirs:.3e}"


@pytest.mark.skipif(VERSION < (4, 53), reason="transformers before 4.53 makes masks itself")
def test_padding_and_windows_need_no_matrix(device, monkeypatch):
    from vivace.transformers.masks import MaskPlan

    def fail(self):
        raise AssertionError("the mask was computed")

    monkeypatch.setattr(MaskPlan, "visible", fail)
    for name in ("llama", "mistral", "gemma2"):
        _, ours = models.pair(name, torch.bfloat16, device)
        ids = models.tokens(2, 15, device)
        for side in ("left", "right"):
            mask = models.padding(2, 15, side, device)
            logits(ours, ids, attention_mask=mask, position_ids=positions_of(mask))
        positions = torch.cat([torch.arange(n, device=device) for n in (7, 8)])[None]
        logits(ours, ids[:1], position_ids=positions, use_cache=False)


@pytest.mark.skipif(VERSION < (5, 0), reason="torch.compile with the models of transformers 5")
@pytest.mark.parametrize("name", ["mistral"])
def test_a_compiled_model_agrees_with_the_plain_one(name, device):
    _, ours = models.pair(name, device=device)
    ids, mask = models.tokens(2, 12, device), models.padding(2, 12, "left", device)
    compiled = torch.compile(ours, backend="aot_eager")
    for options in ({}, {"attention_mask": mask, "position_ids": positions_of(mask)}):
        real = mask.bool() if options else torch.ones_like(mask, dtype=torch.bool)
        expected, got = logits(ours, ids, **options), logits(compiled, ids, **options)
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_two_threads_get_what_one_gets(name, device):
    model = models.build(name, "vivace", device=device)
    batches = [(models.tokens(2, n, device), models.padding(2, n, "left", device)) for n in (9, 12, 15, 18)]

    def run(batch):
        ids, mask = batch
        with torch.no_grad():
            return model(ids, attention_mask=mask)[0][mask.bool()]

    expected = [run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, batches * 5))
    for got, wanted in zip(results, expected * 5, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["whole", "left"])
def test_a_model_whose_attention_is_a_class_for_each_implementation_agrees_with_eager(side, registered):
    """Falcon, in every version."""
    options = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    trio = []
    for name in ("eager", "vivace"):
        config = transformers.FalconConfig(**options)
        config._attn_implementation = name
        trio.append(transformers.FalconForCausalLM(config).eval())
    eager, ours = trio
    for parameter in eager.parameters():
        parameter.data.normal_(0.0, 0.12)
    ours.load_state_dict(eager.state_dict())
    assert {entry["implementation"] for entry in registered.explain(ours)} == {"vivace"}
    ids = models.tokens(3, 13)
    mask = torch.ones_like(ids) if side == "whole" else models.padding(3, 13, side)
    got, expected = (logits(model, ids, attention_mask=mask)[mask.bool()] for model in (ours, eager))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_wrapper_that_holds_itself_is_no_endless_loop():
    from vivace.transformers.classes import _rebound

    def decorator(function):
        def wrapper(*args):
            wrapper.calls += 1
            return function(*args)

        wrapper.calls = 0
        return wrapper

    @decorator
    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    @decorator
    def add(a, b):
        return a + b

    assert _rebound(attend) is not None and _rebound(add) is None


@pytest.mark.skipif(VERSION < (4, 53), reason="transformers before 4.53 makes masks itself")
def test_a_mask_on_another_device_is_moved(device, monkeypatch):
    eager, ours = models.pair("llama", device=device)
    ids, mask = models.tokens(2, 9, device), models.padding(2, 9, "left", device)
    expected = logits(eager, ids, attention_mask=mask)[mask.bool()]
    kept, moved = attention.plan_of, []

    class Elsewhere:  # a mask that says it is on another device
        def __init__(self, mask):
            self.mask, self.device = mask, torch.device("meta")

        def to(self, device, copy):
            moved.append(device)
            return self.mask.clone()

    def attend(module, query, key, value, attention_mask, **kwargs):
        monkeypatch.setattr(attention, "plan_of", lambda m: kept(m.mask) if isinstance(m, Elsewhere) else kept(m))
        return attention.attention(module, query, key, value, Elsewhere(attention_mask), **kwargs)

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "vivace", attend)
    got = logits(ours, ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(moved) == 2


@pytest.mark.skipif(VERSION < (4, 53), reason="transformers before 4.53 makes masks itself")
def test_a_mask_that_is_longer_than_the_keys_is_cut(registered, device):
    from vivace.transformers.masks import AttentionMask, plan_of_padding

    padding = models.padding(2, 9, "left", device)
    plan = plan_of_padding(padding, 4, 9, attention.Pattern(window_right=0))
    mask = AttentionMask(plan, torch.float32, torch.device(device))
    q, k, v = torch.randn(2, 4, 4, 16, device=device), *torch.randn(2, 2, 2, 7, 16, device=device)
    out, _ = attention.attention(torch.nn.Identity(), q, k, v, mask)
    visible = plan.visible()[..., :7]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
