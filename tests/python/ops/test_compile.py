"""The operators under torch.compile, torch.library.opcheck and TorchScript."""

import warnings
from typing import Optional

import pytest
import torch
from torch.library import opcheck

from .cases import OPS, arrange, cumulative


def randn(device, *shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape).to(dtype).to(device).requires_grad_(grad)


def qkv(device, grad=False, layout="contiguous", dim=32):
    return tuple(
        arrange(randn(device, 2, s, h, dim), layout).detach().requires_grad_(grad)
        for s, h in ((9, 4), (13, 2), (13, 2))
    )


def packed(device, grad=False):
    return tuple(randn(device, n, h, 32, grad=grad) for n, h in ((9, 4), (13, 2), (13, 2)))


def varlen_arguments(device):
    return cumulative((4, 5), device), cumulative((6, 7), device), 5, 7


def cache_call(device, dtype=torch.float32):
    args = (
        randn(device, 2, 1, 4, 32, dtype=dtype),
        randn(device, 2, 16, 2, 32, dtype=dtype),
        randn(device, 2, 16, 2, 32, dtype=dtype),
        randn(device, 2, 1, 2, 32, dtype=dtype),
        randn(device, 2, 1, 2, 32, dtype=dtype),
        torch.tensor([3, 9], dtype=torch.int32, device=device),
    )
    return args, {"causal": True}


def sample_call(device):
    ones = torch.ones(2, device=device)
    args = (
        randn(device, 3, 50),
        torch.tensor([[0, 1], [2, -1]], dtype=torch.int32, device=device),
        torch.zeros(2, 50, dtype=torch.uint8, device=device),
        ones * 0.5,
        ones,
        ones * 1.2,
        ones * 0.05,
        ones * 0.9,
        torch.zeros(2, dtype=torch.int32, device=device),
    )
    return args, (torch.tensor([1, 2], device=device), torch.tensor([0, 5], device=device))


def sample_advance_call(device):
    def whole(*values):
        return torch.tensor(values, device=device)

    args = (*sample_call(device)[0], whole(1, 2), whole(0, 5), whole(0, 0), whole(3, 4))
    lengths = torch.tensor([7, 8, 9], dtype=torch.int32, device=device)
    history = torch.zeros(2, 2, dtype=torch.int64, device=device)
    return (*args, lengths, whole(1, 1), 100), {"history": history, "turn": whole(0, 1)}


def decode_step_call(device):
    if device == "cuda":
        pytest.skip("the shapes that CUDA kernels take are run by test_decode_step.py")
    sizes = ((11, 16), (7, 16), (2, 16), (2, 32, 16), (2, 16, 16), (2, 16), (2, 48, 16), (2, 16, 24), (16,), (11, 16))
    weights = [randn(device, *size) for size in sizes]
    whole = [torch.tensor(values) for values in ((1, 2), (1, 2), (0, 1, 1))]
    args = (*whole, *weights, randn(device, 9, 4), randn(device, 9, 4), randn(device, 2, 4, 9, 1, 8))
    args += (randn(device, 2, 4, 9, 1, 8), torch.tensor([0, 3, 8], dtype=torch.int32))
    args += (torch.tensor([2, 0, 1], dtype=torch.int32), torch.zeros(0, dtype=torch.uint8))
    return args, {"probes": torch.zeros(1, 3, 1, 9), "probe_layers": [1], "probe_heads": [0]}


def backward_call(device):
    q, k, v = qkv(device)
    out, lse = OPS.attention(q, k, v, causal=True)
    return (torch.randn_like(out), q, k, v, out, lse), {"causal": True}


def varlen_backward_call(device):
    q, k, v = packed(device)
    out, lse = OPS.attention_varlen(q, k, v, *varlen_arguments(device), causal=True)
    return (torch.randn_like(out), q, k, v, out, lse, *varlen_arguments(device)), {"causal": True}


# name of the case: operator, and its arguments on a device
CALLS = {
    "attention": (OPS.attention, lambda d: (qkv(d), {"causal": True})),
    "attention gradient": (OPS.attention, lambda d: (qkv(d, grad=True), {"causal": True})),
    "attention permuted": (OPS.attention, lambda d: (qkv(d, layout="permuted"), {})),
    "attention permuted gradient": (OPS.attention, lambda d: (qkv(d, grad=True, layout="permuted"), {})),
    "attention packed": (OPS.attention, lambda d: (qkv(d, layout="packed"), {"window_left": 3})),
    "attention options": (
        OPS.attention,
        lambda d: (
            qkv(d),
            {"bias": randn(d, 1, 4, 9, 13), "sinks": randn(d, 4), "softcap": 10.0, "alibi_slopes": randn(d, 4).abs()},
        ),
    ),
    "attention dropout": (
        OPS.attention,
        lambda d: (qkv(d), {"dropout_p": 0.2, "rng_state": torch.tensor([1, 2], device=d)}),
    ),
    "attention_varlen": (OPS.attention_varlen, lambda d: ((*packed(d), *varlen_arguments(d)), {"causal": True})),
    "attention_varlen gradient": (OPS.attention_varlen, lambda d: ((*packed(d, grad=True), *varlen_arguments(d)), {})),
    "attention_with_kvcache": (OPS.attention_with_kvcache, cache_call),
    "attention_with_kvcache probe": (
        OPS.attention_with_kvcache,
        lambda d: (cache_call(d)[0], {"probe": torch.zeros(2, 1, 16, device=d), "probe_head": 1}),
    ),
    "attention_backward": (OPS.attention_backward, backward_call),
    "attention_varlen_backward": (OPS.attention_varlen_backward, varlen_backward_call),
    "rms_norm": (OPS.rms_norm, lambda d: ((randn(d, 3, 5, 64), randn(d, 64)), {})),
    "add_rms_norm": (OPS.add_rms_norm, lambda d: ((randn(d, 3, 64), randn(d, 3, 64), randn(d, 64)), {})),
    "rotary_embedding": (OPS.rotary_embedding, lambda d: ((randn(d, 5, 2, 32), randn(d, 9, 16), randn(d, 9, 16)), {})),
    "rotary_embedding permuted": (
        OPS.rotary_embedding,
        lambda d: ((arrange(randn(d, 2, 5, 3, 32), "permuted"), randn(d, 9, 8), randn(d, 9, 8)), {"interleaved": True}),
    ),
    "rotary_embedding_": (
        OPS.rotary_embedding_,
        lambda d: ((randn(d, 5, 2, 32), randn(d, 9, 16), randn(d, 9, 16)), {}),
    ),
    "silu_gate": (OPS.silu_gate, lambda d: ((randn(d, 3, 64),), {})),
    "sample": (OPS.sample, lambda d: ((*sample_call(d)[0], *sample_call(d)[1]), {})),
    "sample_advance": (OPS.sample_advance, sample_advance_call),
    "decode_step": (OPS.decode_step, decode_step_call),
    "sampling_probs": (OPS.sampling_probs, lambda d: (sample_call(d)[0], {})),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts_the_operator(name, device):
    op, make = CALLS[name]
    if device == "cuda" and "_backward" in name:
        pytest.skip("there are no CUDA backward kernels; gradients recompute in torch")
    args, kwargs = make(device)
    opcheck(op.default, args, kwargs)


def fresh_compile(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("name", [name for name in CALLS if "gradient" not in name])
def test_a_compiled_call_gives_the_bits_of_an_eager_one(name, device):
    op, make = CALLS[name]
    if device == "cuda" and "_backward" in name:
        pytest.skip("there are no CUDA backward kernels; gradients recompute in torch")
    args, kwargs = make(device)
    twin = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    twin_kwargs = {key: a.clone() if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
    compiled = fresh_compile(lambda *a: op(*a, **twin_kwargs))
    expected, actual = op(*args, **kwargs), compiled(*twin)
    for e, a in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (expected, actual)), strict=True):
        assert (e is None and a is None) or torch.equal(e, a)
    for e, a in zip(
        [*args, *kwargs.values()], [*twin, *twin_kwargs.values()], strict=True
    ):  # what was written in place
        assert not isinstance(e, torch.Tensor) or torch.equal(e, a)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_compiled_gradients_equal_eager_ones(device, layout):
    def loss(q, k, v):
        out, _ = OPS.attention(q, k, v, causal=True)
        return (out * out).sum()

    eager = torch.autograd.grad(loss(*(leaves := qkv(device, grad=True, layout=layout))), leaves)
    again = tuple(t.detach().requires_grad_() for t in leaves)
    compiled = torch.autograd.grad(fresh_compile(loss)(*again), again)
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)


def count_compilations(function, calls):
    """How often dynamo compiles ``function`` over the calls, whose results are compared with eager ones."""
    compilations = 0

    def backend(graph, _):
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for args in calls:
        torch.testing.assert_close(compiled(*args), function(*args))
    return compilations


def test_one_compilation_serves_many_lengths(device):
    def calls():
        for seqlen in (5, 17, 64, 130, 33):
            q, k, v = (randn(device, 2, seqlen, h, 32) for h in (4, 2, 2))
            for t in (q, k, v):
                torch._dynamo.mark_dynamic(t, 1)
            yield q, k, v

    assert count_compilations(lambda q, k, v: OPS.attention(q, k, v, causal=True)[0] + q.shape[1], calls()) == 1


def test_one_compilation_serves_many_token_counts(device):
    cos, sin, weight = randn(device, 200, 16), randn(device, 200, 16), randn(device, 64)

    def block(x, w):
        y = OPS.rms_norm(x, w)
        y = OPS.rotary_embedding(y.view(-1, 2, 32), cos, sin).flatten(1)
        return OPS.silu_gate(y), y.shape[0]

    def calls():
        for tokens in (5, 17, 64, 130):
            x = randn(device, tokens, 64)
            torch._dynamo.mark_dynamic(x, 0)
            yield x, weight

    assert count_compilations(block, calls()) == 1


def test_one_compilation_serves_many_ragged_batches(device):
    def calls():
        for lengths in ((4, 5), (30, 7), (100, 3)):
            cu = cumulative(lengths, device)
            q, k, v = (randn(device, sum(lengths), h, 32) for h in (4, 2, 2))
            for t in (q, k, v):
                torch._dynamo.mark_dynamic(t, 0)
            yield q, k, v, cu

    def call(q, k, v, cu):
        return OPS.attention_varlen(q, k, v, cu, cu, 100, 100, causal=True)[0] + q.shape[0]

    assert count_compilations(call, calls()) == 1


def test_one_compilation_serves_a_growing_batch_over_a_cache(device):
    def calls():
        for batch in (2, 5, 9):
            q = randn(device, batch, 1, 4, 32)
            caches = [randn(device, batch, 16, 2, 32) for _ in range(2)]
            lengths = torch.randint(1, 16, (batch,), dtype=torch.int32, device=device)
            for t in (q, *caches, lengths):
                torch._dynamo.mark_dynamic(t, 0)
            yield q, *caches, lengths

    def call(q, k_cache, v_cache, lengths):
        return OPS.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths)[0] * 2

    assert count_compilations(call, calls()) == 1


def script_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    lengths: Optional[torch.Tensor],  # noqa: UP045
):
    out, lse = torch.ops.vivace.attention_with_kvcache(
        q, k_cache, v_cache, k, k, lengths, None, None, None, None, None, None, 0, None, True
    )
    normed = torch.ops.vivace.rms_norm(out, torch.ones(32, device=q.device), 1e-5)
    return torch.ops.vivace.silu_gate(normed), lse


def test_torchscript_calls_the_operators(device, tmp_path):
    (q, k_cache, v_cache, k, _, lengths), _ = cache_call(device)
    expected = script_attention(q, k_cache.clone(), v_cache.clone(), k, lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(script_attention)
        scripted.save(str(tmp_path / "operators.pt"))
        loaded = torch.jit.load(str(tmp_path / "operators.pt"))
    for function in (scripted, loaded):
        caches = k_cache.clone(), v_cache.clone()
        actual = function(q, *caches, k, lengths)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert torch.equal(caches[0][0, 3], k[0, 0]), "the append must be seen outside"


def test_inference_mode_and_autocast_leave_the_operators_working(device):
    q, k, v = qkv(device)
    with torch.inference_mode():
        assert torch.equal(OPS.attention(q, k, v)[0], OPS.attention(q.clone(), k, v)[0])


@pytest.mark.slow
def test_inductor_compiles_a_layer_of_operators():
    weight = torch.randn(64)

    def layer(x):
        y = OPS.rms_norm(x, weight)
        qkv = y.view(2, -1, 2, 32) * 1.5
        return OPS.attention(qkv, qkv, qkv, causal=True)[0].flatten(2) + x

    x = torch.randn(2, 7, 64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
