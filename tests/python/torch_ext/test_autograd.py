"""Gradients of the operators: by finite differences in float64, and against torch's own where it has them."""

import pytest
import torch
from torch.autograd import gradcheck

import vivace
import vivace.ops
from vivace import recompute

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([[0.5, 0.25, 0.1, 0.3], [0.2, 0.4, 0.6, 0.8]])},
    "bias": {"bias": torch.linspace(-1, 1, 4 * 5 * 7).view(1, 4, 5, 7).double()},
    "hidden": {"bias": torch.arange(5 * 7).view(1, 1, 5, 7) % 3 > 0},
    "sinks": {"sinks": torch.tensor([0.5, -0.5, 1.0, 0.0])},
    "dropout": {"dropout_p": 0.4, "rng_state": torch.tensor([7, 3])},
}


def qkv(seqlen_q=5, seqlen_k=7, dtype=torch.float64):
    shapes = (2, seqlen_q, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, 6)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def recomputed(q, k, v, window_size=(-1, -1), **options):
    left, right = window_size
    return recompute.attention(q, k, v, window_left=left, window_right=right, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_gradients_are_the_finite_differences(name):
    assert gradcheck(lambda *t: vivace.attention(*t, **OPTIONS[name]), qkv(), atol=1e-5)


COMBINED = {
    "causal_window_softcap": {"causal": True, "window_size": (3, 0), "softcap": 1.5},
    "window_alibi": {"window_size": (1, 3), "alibi_slopes": OPTIONS["alibi"]["alibi_slopes"]},
    "causal_bias_scale": {"causal": True, "bias": OPTIONS["bias"]["bias"], "softmax_scale": 0.7},
    "hidden_dropout": {**OPTIONS["hidden"], **OPTIONS["dropout"]},
}


@pytest.mark.parametrize("seqlen_q", [5, 9])
@pytest.mark.parametrize("name", COMBINED)
def test_gradients_of_combined_options_are_the_finite_differences(name, seqlen_q):
    options = COMBINED[name]
    if seqlen_q == 9 and "bias" in options:
        options = {**options, "bias": options["bias"][..., :1, :]}
    assert gradcheck(lambda *t: vivace.attention(*t, **options), qkv(seqlen_q), atol=1e-5)


def test_gradients_of_bias_and_of_packed_windows_are_the_finite_differences():
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda b, *t: vivace.attention(*t, bias=b, causal=True), (bias, *qkv()), atol=1e-5)
    packed = tuple(torch.randn(11, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    cu = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    options = {"causal": True, "window_size": (2, 0), "softcap": 2.0}
    assert gradcheck(lambda *t: vivace.attention_varlen(*t, cu, cu, 7, 7, **options), packed, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_result_does_not_depend_on_whether_gradients_are_possible(context):
    q, k, v = qkv()
    expected = vivace.attention(q, k, v, causal=True).detach()
    with context():
        out = vivace.attention(q.detach(), k.detach(), v.detach(), causal=True)
        with_leaves = vivace.attention(q, k, v, causal=True)
    assert torch.equal(out, expected) and not out.requires_grad
    assert torch.equal(with_leaves.detach(), expected) and with_leaves.requires_grad == (context is torch.enable_grad)


@pytest.mark.parametrize("name", OPTIONS)
def test_recomputation_in_torch_equals_the_operator(name):
    q, k, v = qkv()
    out, lse = vivace.attention(q, k, v, **OPTIONS[name], return_lse=True)
    expected, expected_lse = recomputed(q, k, v, **OPTIONS[name])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    weights = torch.randn_like(out)
    for grad, reference in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_lse_has_a_gradient(name):
    q, k, v = qkv()
    lse = vivace.attention(q, k, v, **OPTIONS[name], return_lse=True)[1]
    expected = recomputed(q, k, v, **OPTIONS[name])[1]
    weights = torch.randn_like(lse)
    grads = torch.autograd.grad((lse * weights).sum(), (q, k))
    references = torch.autograd.grad((expected * weights).sum(), (q, k))
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference)


def test_bias_and_sinks_have_gradients():
    q, k, v = qkv()
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    inputs = (q, k, v, bias, sinks)
    out = vivace.attention(q, k, v, bias=bias, sinks=sinks)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    references = torch.autograd.grad(recomputed(q, k, v, bias=bias, sinks=sinks)[0].square().sum(), inputs)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference)


def test_rows_that_see_no_key_have_zero_gradients():
    q, k, v = qkv(seqlen_q=9, seqlen_k=4)
    out = vivace.attention(q, k, v, causal=True)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(dq[:, :5], torch.zeros_like(dq[:, :5]))
    for grad in (dq, dk, dv):
        assert torch.isfinite(grad).all()
    assert dq[:, 6:].abs().sum() > 0


VARLEN_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "alibi": OPTIONS["alibi"],
    "dropout": OPTIONS["dropout"],
    "sinks": OPTIONS["sinks"],
    "used": {
        "seqused_q": torch.tensor([2, 5], dtype=torch.int32),
        "seqused_k": torch.tensor([4, 1], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("name", VARLEN_OPTIONS)
def test_attention_varlen_gradients_are_the_finite_differences(name):
    shapes = (8, 4, 8), (11, 2, 8), (11, 2, 6)
    packed = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    cu_q = torch.tensor([0, 3, 8], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 11], dtype=torch.int32)

    def run(*tensors):
        return vivace.attention_varlen(*tensors, cu_q, cu_k, 5, 7, **VARLEN_OPTIONS[name])

    assert gradcheck(run, packed, atol=1e-5)


def test_sixteen_bit_gradients_are_within_twice_the_error_of_torch():
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in qkv(33, 47))
    exact = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
    weights = torch.randn(2, 33, 4, 6).bfloat16()

    def gradients(function, inputs):
        return torch.autograd.grad((function(*inputs) * weights.to(inputs[0].dtype)).sum(), inputs)

    def torch_attention(q, k, v):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)

    truth = gradients(torch_attention, exact)
    ours, torchs = gradients(vivace.attention, (q, k, v)), gradients(torch_attention, (q, k, v))
    for grad, other, reference in zip(ours, torchs, truth, strict=True):
        error = (grad.double() - reference).abs().max()
        unit = torch.finfo(torch.bfloat16).eps * reference.abs().max()
        assert error <= torch.maximum(2 * (other.double() - reference).abs().max(), unit)


def test_elementwise_gradients_are_the_finite_differences():
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(5, 3, dtype=torch.float64)
    assert gradcheck(vivace.rms_norm, (x, weight))
    assert gradcheck(vivace.silu_gate, (x,))
    for interleaved in (False, True):
        assert gradcheck(lambda t: vivace.rotary_embedding(t, angle.cos(), angle.sin(), None, interleaved), (x,))  # noqa: B023


def test_an_operator_without_a_gradient_refuses_arguments_that_require_one():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"vivace\.add_rms_norm: it has no gradient, but an argument requires one"):
        vivace.add_rms_norm(x, torch.randn(2, 8), torch.ones(8))
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    cache = torch.zeros(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match=r"vivace\.attention_with_kvcache: it has no gradient"):
        vivace.attention_with_kvcache(q, cache, cache)
    with torch.no_grad():
        vivace.attention_with_kvcache(q, cache, cache)


def test_a_saved_tensor_that_an_operator_overwrites_is_noticed():
    weight = torch.ones(8, requires_grad=True)
    residual = torch.randn(2, 8)
    product = (residual * weight).sum()  # saves residual
    with torch.no_grad():
        vivace.add_rms_norm(torch.randn(2, 8), residual, torch.ones(8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
