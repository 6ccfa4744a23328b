"""Gradients of attention: the backward operators, and autograd through the forward ones."""

import pytest
import torch

from reference.attention import attention, gradients
from reference.tolerance import assert_accurate
from reference.varlen import attention_varlen

from .cases import HEAD_DIMS, HEADS, MASKS, OPS, arrange, cumulative, grid, make_bias, make_slopes

LENGTHS = ((1, 1), (1, 60), (5, 3), (33, 70), (64, 64), (70, 33), (40, 41))


def compare(actual, q, k, v, dout, **options):
    exact = gradients(q, k, v, dout, **options)
    low = gradients(q, k, v, dout, **options, compute=q.dtype)
    # flash-attn's slack for softcap; in float32 dP - rowsum(dout * out) cancels terms of size sqrt(head_dim)
    atol = 3e-4 if options.get("softcap") else 2e-5 if q.dtype == torch.float32 else 0.0
    for name, a, e, approximate, t in zip(("dq", "dk", "dv"), actual, exact, low, (q, k, v), strict=True):
        assert a.dtype == t.dtype and a.device == t.device
        assert_accurate(a, e, approximate, factor=3.0, atol=atol, what=name)


def by_autograd(function, q, k, v, dout, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, _ = function(*leaves, **options)
    return torch.autograd.grad(out, leaves, dout)


def make(case, lengths):
    (seqlen_q, seqlen_k), (heads, heads_kv), dim = lengths, case.heads, case.head_dim
    layout = getattr(case, "layout", "contiguous")
    q = arrange(case.randn(2, seqlen_q, heads, dim), layout)
    k, v = (arrange(case.randn(2, seqlen_k, heads_kv, dim), layout) for _ in range(2))
    return q, k, v, arrange(case.randn(2, seqlen_q, heads, dim), layout)


@grid(
    "backward_op",
    cpu=70,
    cuda=0,
    lengths=LENGTHS,
    heads=HEADS,
    head_dim=HEAD_DIMS,
    mask=MASKS,
    softcap=(0.0, 0.0, 20.0),
    slopes=(None, None, "heads", "batch"),
    bias=(None, None, ("fp32", "full"), ("bool", "one"), ("dtype", "keys")),
    sinks=(False, False, True),
    p=(0.0, 0.0, 0.17),
    layout=("contiguous", "permuted", "unaligned"),
    deterministic=(False, True),
    softmax_scale=(None, None, 0.2),
)
def test_backward_equals_autograd_of_the_reference(case):
    q, k, v, dout = make(case, case.lengths)
    batch, seqlen_q, heads, _ = q.shape
    options = {
        **MASKS[case.mask],
        "softmax_scale": case.softmax_scale,
        "softcap": case.softcap,
        "alibi_slopes": make_slopes(case, case.slopes, batch, heads),
        "bias": make_bias(case, case.bias, batch, heads, seqlen_q, k.shape[1]),
        "sinks": torch.randn(heads).to(case.device) if case.sinks else None,
        "dropout_p": case.p,
        "rng_state": torch.tensor([3, 9], device=case.device) if case.p else None,
    }
    out, lse = OPS.attention(q, k, v, **options)
    actual = OPS.attention_backward(dout, q, k, v, out, lse, **options, deterministic=case.deterministic)
    compare(actual, q, k, v, dout, **options)


@grid(
    "backward_varlen_op",
    cpu=24,
    cuda=0,
    lengths=(((5, 30, 1), (17, 41, 33)), ((0, 40, 3), (12, 0, 50)), ((1, 1), (60, 3))),
    heads=HEADS,
    head_dim=HEAD_DIMS,
    mask=MASKS,
    softcap=(0.0, 0.0, 20.0),
    slopes=(None, "heads", "batch"),
    p=(0.0, 0.17),
)
def test_varlen_backward_equals_autograd_of_the_reference(case):
    (lengths_q, lengths_k), (heads, heads_kv), dim = case.lengths, case.heads, case.head_dim
    q, k, v, dout = (
        case.randn(sum(n), h, dim)
        for n, h in ((lengths_q, heads), (lengths_k, heads_kv), (lengths_k, heads_kv), (lengths_q, heads))
    )
    cu = (cumulative(lengths_q, case.device), cumulative(lengths_k, case.device))
    options = {
        **MASKS[case.mask],
        "softcap": case.softcap,
        "alibi_slopes": make_slopes(case, case.slopes, len(lengths_q), heads),
        "dropout_p": case.p,
        "rng_state": torch.tensor([3, 9], device=case.device) if case.p else None,
    }
    longest = (max(lengths_q), max(lengths_k))
    out, lse = OPS.attention_varlen(q, k, v, *cu, *longest, **options)
    actual = OPS.attention_varlen_backward(dout, q, k, v, out, lse, *cu, *longest, **options)
    named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu, strict=True))
    compare(actual, q, k, v, dout, **named, **options, function=attention_varlen)


@grid(
    "autograd",
    cpu=12,
    cuda=30,
    lengths=(*LENGTHS, (128, 256)),
    heads=HEADS,
    head_dim=(64, 128, 40),
    mask=MASKS,
    softcap=(0.0, 0.0, 20.0),
    slopes=(None, "heads"),
    bias=(None, ("fp32", "full"), ("bool", "one")),
    p=(0.0, 0.0, 0.17),
    layout=("contiguous", "permuted"),
)
def test_autograd_through_attention_equals_autograd_of_the_reference(case):
    q, k, v, dout = make(case, case.lengths)
    batch, seqlen_q, heads, _ = q.shape
    options = {
        **MASKS[case.mask],
        "softcap": case.softcap,
        "alibi_slopes": make_slopes(case, case.slopes, batch, heads),
        "bias": make_bias(case, case.bias, batch, heads, seqlen_q, k.shape[1]),
        "dropout_p": case.p,
        "rng_state": torch.tensor([3, 9], device=case.device) if case.p else None,
    }
    compare(by_autograd(OPS.attention, q, k, v, dout, **options), q, k, v, dout, **options)


@grid("autograd_varlen", cpu=4, cuda=9, mask=("full", "causal", "left"), head_dim=(64, 40))
def test_autograd_through_varlen_equals_autograd_of_the_reference(case):
    lengths_q, lengths_k = (5, 70, 1), (17, 81, 33)
    q, k, v, dout = (
        case.randn(sum(n), h, case.head_dim)
        for n, h in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2), (lengths_q, 4))
    )
    named = {"cu_seqlens_q": cumulative(lengths_q, case.device), "cu_seqlens_k": cumulative(lengths_k, case.device)}
    options = {**named, **MASKS[case.mask]}
    actual = by_autograd(OPS.attention_varlen, q, k, v, dout, **options, max_seqlen_q=70, max_seqlen_k=81)
    compare(actual, q, k, v, dout, **options, function=attention_varlen)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"softcap": 5.0, "window_left": 2}], ids=["full", "causal", "softcap"]
)
def test_gradcheck_passes_in_float64(options):
    q, k, v = (torch.randn(1, s, h, 5, dtype=torch.float64, requires_grad=True) for s, h in ((4, 4), (6, 2), (6, 2)))
    assert torch.autograd.gradcheck(lambda *t: OPS.attention(*t, **options)[0], (q, k, v))


def test_gradcheck_passes_in_float64_for_varlen():
    q, k, v = (torch.randn(n, h, 4, dtype=torch.float64, requires_grad=True) for n, h in ((5, 2), (8, 1), (8, 1)))
    cu_q, cu_k = cumulative((2, 3)), cumulative((3, 5))
    assert torch.autograd.gradcheck(lambda *t: OPS.attention_varlen(*t, cu_q, cu_k, 3, 5, causal=True)[0], (q, k, v))


@grid("backward_bitwise", cpu=2, cuda=0)
def test_twenty_backward_runs_give_the_same_bits(case):
    q, k, v, dout = (case.randn(2, s, h, 64) for s, h in ((70, 4), (90, 2), (90, 2), (70, 4)))
    out, lse = OPS.attention(q, k, v, causal=True)
    first = OPS.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    for _ in range(20):
        again = OPS.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@grid("backward_empty_rows", cpu=3, cuda=6)
def test_rows_that_see_nothing_get_zero_gradients(case):
    q, k, v, dout = (case.randn(1, s, 2, 64) for s in (40, 10, 10, 40))
    dq, dk, dv = by_autograd(OPS.attention, q, k, v, dout, causal=True)
    assert (dq[:, :30] == 0).all()
    assert all(torch.isfinite(t).all() for t in (dq, dk, dv))
    compare((dq, dk, dv), q, k, v, dout, causal=True)


@grid("backward_zero", cpu=3, cuda=3)
def test_zero_lengths_give_zero_gradients(case):
    for seqlen_q, seqlen_k in ((0, 5), (5, 0)):
        q, k, v, dout = (case.randn(2, s, 2, 64) for s in (seqlen_q, seqlen_k, seqlen_k, seqlen_q))
        for gradient, t in zip(by_autograd(OPS.attention, q, k, v, dout), (q, k, v), strict=True):
            assert gradient.shape == t.shape and (gradient == 0).all()


@grid("backward_large", cpu=2, cuda=3)
def test_large_inputs_give_finite_gradients(case):
    q, k, v, dout = (case.randn(1, s, 2, 64, scale=5.0) for s in (65, 65, 65, 65))
    actual = by_autograd(OPS.attention, q, k, v, dout, causal=True)
    assert all(torch.isfinite(t).all() for t in actual)
    exact = gradients(q, k, v, dout, causal=True)
    low = gradients(q, k, v, dout, causal=True, compute=q.dtype)
    for a, e, approximate in zip(actual, exact, low, strict=True):
        assert_accurate(a, e, approximate, factor=5.0, atol=1e-3)


@grid("autograd_extras", cpu=4, cuda=6, mask=("full", "causal"), form=("full", "keys", "heads"))
def test_bias_and_sinks_and_lse_are_differentiable(case):
    tensors = [case.randn(2, s, h, 64) for s, h in ((20, 4), (33, 2), (33, 2))]
    tensors += [make_bias(case, ("fp32", case.form), 2, 4, 20, 33), torch.randn(4).to(case.device)]
    dout, dlse = case.randn(2, 20, 4, 64), case.randn(2, 4, 20, dtype=torch.float32)

    def grads(function, dtype, **options):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        out, lse = function(*leaves[:3], bias=leaves[3], sinks=leaves[4], **MASKS[case.mask], **options)
        return torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))

    actual = grads(OPS.attention, None)
    exact = grads(attention, torch.float64)
    low = grads(attention, case.dtype, compute=case.dtype)
    for name, t, a, e, approximate in zip(
        ("dq", "dk", "dv", "dbias", "dsinks"), tensors, actual, exact, low, strict=True
    ):
        assert a.dtype == t.dtype
        # bias and sinks stay in float32, where the low arithmetic rounds them: its error is the measure all the same.
        assert_accurate(a, e, approximate, factor=3.0, atol=2e-5, what=name)
