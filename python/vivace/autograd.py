"""Gradients of the operators, by torch.library.register_autograd (torch's stable ABI has no autograd of its own).

Attention runs the backward operators on the CPU. On CUDA, which has no backward kernels of ours yet, torch's flash
backward runs on our output and lse where it covers the call (torch_backward.py). The rest, and gradients of bias,
sinks and lse, is recomputed in plain torch (recompute.py).
The other operators have closed formulas. In-place operators, attention_with_kvcache and sampling have no gradient.
"""

import contextlib
import contextvars

import torch

from vivace import torch_backward
from vivace.torch_backward import last_contiguous

_deterministic = contextvars.ContextVar("vivace_deterministic_backward", default=False)


@contextlib.contextmanager
def deterministic_backward(on: bool = True):
    """Attention that is called inside gets a backward whose result is the same bits every time."""
    token = _deterministic.set(on)
    try:
        yield
    finally:
        _deterministic.reset(token)


def register() -> None:
    """Registers them all; the operator library must be loaded."""
    for name, backward, setup in (
        ("attention", _attention_backward, _attention_setup),
        ("attention_varlen", _varlen_backward, _varlen_setup),
        ("rms_norm", _rms_norm_backward, _rms_norm_setup),
        ("rotary_embedding", _rotary_backward, _rotary_setup),
        ("silu_gate", _silu_gate_backward, _silu_gate_setup),
    ):
        _register(name, backward, setup)


_library = None  # keeps what is registered


def _register(name: str, backward, setup) -> None:
    """torch.library.register_autograd, whose kernel takes 8 us of Python for a call that needs no gradient (on an
    H200's host): those go straight on to the operator here."""
    global _library
    try:
        from torch._library.autograd import Info, make_autograd_impl

        op = getattr(torch.ops.vivace, name).default
        differentiable = make_autograd_impl(op, Info(backward, setup))
        after, redispatch = torch._C._after_autograd_keyset, op.redispatch
        any_requires_grad, enabled = torch._C._any_requires_grad, torch._C.is_grad_enabled
    except (ImportError, AttributeError, TypeError):  # another torch: none of this is public
        torch.library.register_autograd(f"vivace::{name}", backward, setup_context=setup)
        return

    def kernel(keyset, *args):
        if enabled() and any_requires_grad(*args):
            return differentiable(keyset, *args)
        return redispatch(keyset & after, *args)

    if _library is None:
        _library = torch.library.Library("vivace", "FRAGMENT")
    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _attention_setup(ctx, inputs, output):
    q, k, v, *scalars, alibi_slopes, bias, sinks, dropout_p, rng_state = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, bias, sinks, rng_state)
    ctx.scalars = scalars  # softmax_scale, causal, window_left, window_right, softcap
    ctx.dropout_p = dropout_p
    ctx.deterministic = _deterministic.get()
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, dout, dlse):
    q, k, v, out, lse, alibi_slopes, bias, sinks, rng_state = ctx.saved_tensors
    needs = _needs(ctx, 13)
    bias_at, sinks_at = 9, 10
    grads = [None] * len(needs)
    if dout is None and dlse is None:
        return tuple(grads)
    options = *ctx.scalars, alibi_slopes, bias, sinks, ctx.dropout_p, rng_state
    _, causal, left, right, softcap = ctx.scalars[:5]
    right_open = left >= 0 and right < 0 and not causal and q.shape[1] > k.shape[1]
    covered = torch_backward.covers(q, v, softcap, alibi_slopes, bias, sinks, ctx.dropout_p, right_open)
    if dlse is None and covered:
        grads[:3] = torch_backward.attention(dout, q, k, v, out, lse, *ctx.scalars[:4], ctx.deterministic)
    elif q.is_cuda or needs[bias_at] or needs[sinks_at] or dlse is not None:
        results = torch.ops.vivace.attention_recompute_backward(dout, dlse, q, k, v, *options)
        *grads[:3], grads[bias_at], grads[sinks_at] = results
    else:
        grads[:3] = torch.ops.vivace.attention_backward(last_contiguous(dout), q, k, v, out, lse, *options)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _varlen_setup(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table, *rest = inputs
    *scalars, alibi_slopes, _, sinks, dropout_p, rng_state = rest
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    ctx.save_for_backward(q, k, v, *output, *lengths, alibi_slopes, sinks, rng_state)
    ctx.longest = (max_seqlen_q, max_seqlen_k)
    ctx.paged = block_table is not None
    ctx.scalars = scalars
    ctx.dropout_p = dropout_p
    ctx.deterministic = _deterministic.get()
    ctx.set_materialize_grads(False)


def _varlen_backward(ctx, dout, dlse):
    q, k, v, out, lse, cu_q, cu_k, used_q, used_k, alibi_slopes, sinks, rng_state = ctx.saved_tensors
    needs = _needs(ctx, 20)
    sinks_at = 17
    grads = [None] * len(needs)
    if ctx.paged:
        raise RuntimeError(
            "vivace.attention_varlen: there is no gradient with block_table; "
            "pass k and v as (total_k, heads_kv, head_dim)"
        )
    if dout is None and dlse is None:
        return tuple(grads)
    tail = ctx.dropout_p, rng_state
    used = used_q is not None or used_k is not None
    _, causal, left, right, softcap = ctx.scalars[:5]
    right_open = left >= 0 and right < 0 and not causal  # of each sequence only the device knows the lengths
    covered = torch_backward.covers(q, v, softcap, alibi_slopes, None, sinks, ctx.dropout_p, right_open)
    # The backward operator knows neither sinks nor seqused.
    if covered and dlse is None and not used:
        grads[:3] = torch_backward.attention_varlen(
            dout, q, k, v, out, lse, cu_q, cu_k, *ctx.longest, *ctx.scalars[:4], ctx.deterministic
        )
    elif q.is_cuda or dlse is not None or sinks is not None or used:
        results = torch.ops.vivace.attention_recompute_backward(
            dout, dlse, q, k, v, *ctx.scalars, alibi_slopes, None, sinks, *tail, cu_q, cu_k, used_q, used_k
        )
        *grads[:3], _, grads[sinks_at] = results
    else:
        grads[:3] = torch.ops.vivace.attention_varlen_backward(
            last_contiguous(dout), q, k, v, out, lse, cu_q, cu_k, *ctx.longest, *ctx.scalars, alibi_slopes, *tail
        )
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _needs(ctx, arguments):
    # The dispatcher leaves out trailing arguments that have their default values.
    needs = ctx.needs_input_grad
    return needs + (False,) * (arguments - len(needs))


def _rms_norm_setup(ctx, inputs, output):
    x, weight, eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.eps = eps


def _rms_norm_backward(ctx, grad):
    # y = x r w with r = (mean(x^2) + eps)^-1/2:  dx = r (g w) - x r^3 mean(g w x),  dw = sum over rows of g x r
    x, weight = ctx.saved_tensors
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    xf, gw = x.to(compute), grad.to(compute) * weight.to(compute)
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + ctx.eps)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = (r * gw - xf * r**3 * (gw * xf).mean(-1, keepdim=True)).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dw = (grad.to(compute) * xf * r).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dw, None


def _rotary_setup(ctx, inputs, output):
    _, cos, sin, positions, interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.interleaved = interleaved


def _rotary_backward(ctx, grad):
    # A rotation's transpose is the rotation by the opposite angle. cos and sin are tables, not parameters.
    cos, sin, positions = ctx.saved_tensors
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError("vivace.rotary_embedding: cos and sin have no gradient; detach them")
    dx = torch.ops.vivace.rotary_embedding(last_contiguous(grad), cos, -sin, positions, ctx.interleaved)
    return dx, None, None, None, None


def _silu_gate_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _silu_gate_backward(ctx, grad):
    # y = silu(a) b:  da = g b s (1 + a (1 - s)) with s = sigmoid(a),  db = g silu(a)
    (gate_up,) = ctx.saved_tensors
    compute = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    gate, up = gate_up.to(compute).chunk(2, dim=-1)
    g, s = grad.to(compute), torch.sigmoid(gate)
    return torch.cat((g * up * s * (1 + gate * (1 - s)), g * gate * s), dim=-1).to(gate_up.dtype)
