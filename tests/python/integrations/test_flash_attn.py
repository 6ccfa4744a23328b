"""vivace.flash_attn has flash-attn 2.8's signatures and semantics."""

import inspect
import math

import pytest
import torch

from reference.attention import attention, gradients, visible
from reference.kvcache import attention_with_kvcache
from reference.tolerance import assert_accurate
from reference.varlen import attention_varlen
from vivace import flash_attn
from vivace.flash_attn import bert_padding

COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
VARLEN = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], COMMON),
    "flash_attn_qkvpacked_func": (["qkv"], COMMON),
    "flash_attn_kvpacked_func": (["q", "kv"], COMMON),
    "flash_attn_varlen_func": (["q", "k", "v", *VARLEN], {**COMMON, "block_table": None}),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], COMMON),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *VARLEN], COMMON),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "causal_window": {"causal": True, "window_size": (9, 4)},
    "softcap": {"softcap": 15.0},
    "scale": {"softmax_scale": 0.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}


def reference_options(options, device):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours = dict(options)
    left, right = options.pop("window_size", (-1, -1))
    return ours, {**options, "window_left": left, "window_right": right}


def qkv(device, seqlen_q=57, seqlen_k=83, head_dim=40, batch=2, dtype=torch.bfloat16):
    shapes = (batch, seqlen_q, 4, head_dim), (batch, seqlen_k, 2, head_dim), (batch, seqlen_k, 2, head_dim)
    return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    positional, optional = SIGNATURES[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == [*positional, *optional]
    for key, default in optional.items():
        assert parameters[key].default == default
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_as_good_as_torchs(name, device):
    ours, options = reference_options(OPTIONS[name], device)
    q, k, v = (t.requires_grad_() for t in qkv(device))
    dout = torch.randn(2, 57, 4, 40, device=device, dtype=q.dtype)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, **ours, return_attn_probs=True)
    exact, exact_lse = attention(q.detach(), k.detach(), v.detach(), **options)
    low, _ = attention(q.detach(), k.detach(), v.detach(), compute=q.dtype, **options)
    assert_accurate(out.detach(), exact, low)
    assert lse.shape == (2, 4, 57) and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-3, atol=1e-3)
    out = flash_attn.flash_attn_func(q, k, v, **ours)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    exact, low = (
        gradients(q.detach(), k.detach(), v.detach(), dout, compute=compute, **options)
        for compute in (torch.float64, q.dtype)
    )
    for what, grad, reference, other in zip(("dq", "dk", "dv"), grads, exact, low, strict=True):
        assert_accurate(grad, reference, other, factor=3.0, what=what)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_arguments_are_views_of_the_same(causal, device):
    q, k, v = qkv(device, 33, 33)
    expected = flash_attn.flash_attn_func(q, k, v, causal=causal)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, torch.stack((k, v), dim=2), causal=causal), expected)
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    packed = flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), dim=2), causal=causal)
    torch.testing.assert_close(packed, expected, rtol=0.02, atol=0.02)
    cu = torch.arange(0, 3 * 33, 33, dtype=torch.int32, device=device)
    flat = torch.stack((q, k, v), dim=2).flatten(0, 1)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(flat, cu, torch.tensor(33), causal=causal)
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=0.02, atol=0.02)
    packed = flash_attn.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 33, 33, causal=causal)
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["plain", "causal", "causal_window", "softcap"])
def test_sequences_of_different_lengths_and_their_gradients(name, device):
    ours, options = reference_options(OPTIONS[name], device)
    lengths_q, lengths_k = torch.tensor([0, 5, 40, 1]), torch.tensor([7, 30, 40, 0])
    cu_q, cu_k = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int().to(device) for n in (lengths_q, lengths_k))
    shapes = (46, 4, 64), (77, 2, 64), (77, 2, 64)
    q, k, v = (torch.randn(s, device=device, dtype=torch.float16).requires_grad_() for s in shapes)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 40, 40, **ours, return_attn_probs=True)
    plain = [t.detach() for t in (q, k, v)]
    exact, _ = attention_varlen(*plain, cu_q, cu_k, **options)
    low, _ = attention_varlen(*plain, cu_q, cu_k, compute=q.dtype, **options)
    assert_accurate(out.detach(), exact, low)
    assert lse.shape == (4, 46) and torch.isposinf(lse[:, -1]).all()
    dout = torch.randn_like(out)
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 40, 40, **ours)
    grads = torch.autograd.grad(out, (q, k, v), dout)

    def packed(q, k, v, **options):
        return attention_varlen(q, k, v, cu_q, cu_k, **options)

    exact, low = (gradients(*plain, dout, compute=c, function=packed, **options) for c in (torch.float64, q.dtype))
    for what, grad, reference, other in zip(("dq", "dk", "dv"), grads, exact, low, strict=True):
        assert_accurate(grad, reference, other, factor=3.0, what=what)


def test_gradients_of_unused_rows_at_the_end_are_zero(device):
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(20, 2, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, causal=True)
    grads = torch.autograd.grad(out[:12].float().square().sum(), (q, k, v))
    for grad in grads:
        assert torch.isfinite(grad).all() and (grad[12:] == 0).all() and grad[:12].abs().sum() > 0


def test_a_row_that_sees_no_key_is_zero_has_an_infinite_lse_and_no_gradient(device):
    q, k, v = (t.requires_grad_() for t in qkv(device, 9, 4, 64))
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :5] == 0).all() and torch.isposinf(lse[:, :, :5]).all() and torch.isfinite(lse[:, :, 5:]).all()
    assert probabilities.numel() == 0
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    dq, dk, dv = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert (dq[:, :5] == 0).all() and dq[:, 5:].abs().sum() > 0
    assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


def test_dropped_probabilities_are_negative_in_what_is_returned_for_tests(device):
    q, k, v = qkv(device, 130, 70, 64)
    out, _, signed = flash_attn.flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
    assert signed.shape == (2, 4, 256, 128) and signed.dtype == q.dtype
    signed = signed[:, :, :130, :70].float()
    seen = visible(130, 70, causal=True, device=device)
    dropped = torch.signbit(signed)
    fraction = dropped[:, :, seen].float().mean()
    assert abs(fraction - 0.3) < 0.02
    kept = torch.where(dropped, 0.0, signed) / 0.7
    expected = torch.einsum("bhqk,bkhd->bqhd", kept, v.float().repeat_interleave(2, dim=2))
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (130, 70))
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    out, _, signed = flash_attn.flash_attn_varlen_func(
        *flat, cu_q, cu_k, 130, 70, dropout_p=0.3, causal=True, return_attn_probs=True
    )
    kept = torch.where(torch.signbit(signed), 0.0, signed.float())[:, :, :130, :70] / 0.7
    expected = torch.einsum("bhqk,bkhd->bqhd", kept, v.float().repeat_interleave(2, dim=2))
    torch.testing.assert_close(out.view(2, 130, 4, 64).float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_the_cache_is_appended_to_and_read(new, seqlen_q, device):
    q = torch.randn(2, seqlen_q, 4, 64, device=device, dtype=torch.float16)
    k_cache, v_cache = torch.randn(2, 2, 40, 2, 64, device=device, dtype=torch.float16)
    k, v = torch.randn(2, 2, seqlen_q, 2, 64, device=device, dtype=torch.float16) if new else (None, None)
    lengths = torch.tensor([17, 30], dtype=torch.int32, device=device)
    angles = torch.rand(40, 16, device=device)
    rotary = {"rotary_cos": angles.cos().half(), "rotary_sin": angles.sin().half()} if new else {}
    options = {"cache_seqlens": lengths, "causal": True, "rotary_interleaved": False, **rotary}
    copies = [t.clone() for t in (k_cache, v_cache)]
    exact = attention_with_kvcache(q, copies[0].clone(), copies[1].clone(), k, v, **options)[0]
    low = attention_with_kvcache(q, copies[0].clone(), copies[1].clone(), k, v, compute=q.dtype, **options)[0]
    out, lse = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options, return_softmax_lse=True)
    assert_accurate(out, exact, low, factor=3.0, atol=1e-5)
    assert lse.shape == (2, 4, seqlen_q)
    if new:
        assert torch.equal(v_cache[0, 17 : 17 + seqlen_q], v[0]) and torch.equal(v_cache[1, 30 : 30 + seqlen_q], v[1])
    one = flash_attn.flash_attn_with_kvcache(q, *copies, cache_seqlens=20, causal=True)
    other = flash_attn.flash_attn_func(q, copies[0][:, :20], copies[1][:, :20], causal=True)
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_windows_and_lengths_may_be_tensors(device):
    q, k, v = qkv(device, 20, 20, 32)
    window = torch.tensor(3), torch.tensor(-1)
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(3, -1))
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=window), expected)
    cu = torch.tensor([0, 20, 40], dtype=torch.int32, device=device)
    packed = flash_attn.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), cu, cu, torch.tensor(20), torch.tensor(20), window_size=window
    )
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_deterministic_gradients_are_the_same_bits():
    q, k, v = (t.requires_grad_() for t in qkv("cuda", 1000, 1000, 64, batch=4))
    dout = torch.randn(4, 1000, 4, 64, device="cuda", dtype=q.dtype)
    first = None
    for _ in range(10):
        out = flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        first = grads if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
def test_float32_on_the_gpu_is_refused_as_flash_attn_refuses_it():
    q, k, v = (t.float() for t in qkv("cuda"))
    with pytest.raises(RuntimeError, match=r"flash_attn_func: q is float32, expected float16 or bfloat16"):
        flash_attn.flash_attn_func(q, k, v)


@pytest.mark.gpu
def test_gradients_come_from_torchs_flash_backward_and_not_from_a_matrix():
    q, k, v = (torch.randn(1, 16384, 8, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30  # one matrix of scores would be 8 GiB


def test_errors_name_the_argument(device):
    q, k, v = qkv(device)
    with pytest.raises(RuntimeError, match="k has head_dim 32, q has 40"):
        flash_attn.flash_attn_func(q, k[..., :32], v[..., :32])
    with pytest.raises(RuntimeError, match=r"flash_attn_qkvpacked_func: qkv has shape \[2, 57, 4, 40\]"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(RuntimeError, match="cu_seqlens_q"):
        cu = torch.tensor([0, 57, 114], device=device)  # int64
        flash_attn.flash_attn_varlen_func(*(t.flatten(0, 1) for t in (q, k, v)), cu, cu.int(), 57, 83)


def test_unpadding_and_padding_are_inverse(device):
    x = torch.randn(3, 7, 2, 5, device=device, requires_grad=True)
    mask = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 0, 0], [0] * 6 + [1]], device=device)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 7, 10, 11] and longest == 7 and used.tolist() == [7, 3, 1]
    assert cu_seqlens.dtype == torch.int32 and used.dtype == torch.int32
    assert torch.equal(rows, x[mask.bool()])
    back = bert_padding.pad_input(rows, indices, 3, 7)
    assert torch.equal(back, x * mask[..., None, None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x).float())
    unused = torch.zeros_like(mask)
    unused[1, 0] = 1
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert cu_seqlens.tolist() == [0, 7, 11, 12] and used.tolist() == [7, 3, 1] and rows.shape[0] == 12
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]], device=device)
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 9, 10, 11, 12] and longest == 4
    assert torch.equal(rows, torch.cat((x[0, :5], x[1, :4], x[2, :3])))
    x.grad = None
    taken, whole = bert_padding.index_first_axis_residual(x.flatten(0, 1), indices)
    assert torch.equal(taken, rows) and torch.equal(whole, x.flatten(0, 1))
    (2 * taken.sum() + whole.sum()).backward()
    assert x.grad.sum() == x.numel() + 2 * rows.numel()


def test_alibi_slopes_of_each_batch_entry(device):
    q, k, v = qkv(device, 21, 34, 64)
    slopes = torch.rand(2, 4, device=device)
    out = flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    exact, low = (attention(q, k, v, causal=True, alibi_slopes=slopes, compute=c)[0] for c in (torch.float64, q.dtype))
    assert_accurate(out, exact, low)
    assert math.isfinite(out.float().sum())
