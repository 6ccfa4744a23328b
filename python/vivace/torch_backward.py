"""Gradients of attention on CUDA by torch's own flash backward kernels, from our output and log-sum-exp.

torch's kernels (FlashAttention-2, arXiv 2307.08691) recompute the probabilities as exp(score - lse), so that any
forward's output and lse serve. They know causal masks, windows, grouped heads and variable lengths, in float16 and
bfloat16.
"""

import math

import torch
import torch.nn.functional as F

_MULTIPLE = 8  # of head_dim, for torch's kernels


def covers(q, v, softcap, alibi_slopes, bias, sinks, dropout_p, right_open) -> bool:
    """Whether torch's kernels have the gradient of such a call. Dropout's bits are our own.

    right_open: a window bounded on its left alone, over sequences that may have more queries than keys; torch's kernels
    take its right side for seqlen_k, which hides keys from the first rows then.
    """
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1] <= 256
        and softcap == 0.0
        and dropout_p == 0.0
        and alibi_slopes is None
        and bias is None
        and sinks is None
        and not right_open
    )


def attention(dout, q, k, v, out, lse, softmax_scale, causal, window_left, window_right, deterministic=False):
    """(dq, dk, dv) of vivace::attention: q (batch, seqlen_q, heads, head_dim), lse (batch, heads, seqlen_q)."""
    if 0 in q.shape or 0 in k.shape:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sizes = q.shape[1], k.shape[1]
    return _run(
        dout, q, k, v, out, lse, None, None, *sizes, softmax_scale, causal, window_left, window_right, deterministic
    )


def attention_varlen(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_left,
    window_right,
    deterministic=False,
):
    """(dq, dk, dv) of vivace::attention_varlen: q (total_q, heads, head_dim), lse (heads, total_q)."""
    if 0 in q.shape or 0 in k.shape or max_seqlen_q == 0 or max_seqlen_k == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    cu = cu_seqlens_q, cu_seqlens_k
    sizes = max_seqlen_q, max_seqlen_k
    grads = _run(dout, q, k, v, out, lse, *cu, *sizes, softmax_scale, causal, window_left, window_right, deterministic)
    # The kernels leave alone what lies beyond the last sequence, and memory is not zeroed.
    ends = cu_seqlens_q[-1], cu_seqlens_k[-1], cu_seqlens_k[-1]
    return tuple(_zero_beyond(grad, end) for grad, end in zip(grads, ends, strict=True))


def flash_lse(lse):
    """The log-sum-exp as flash-attn's and torch's kernels have it: +inf in a row that sees no key, where ours is -inf,
    the sum's true logarithm. Their backward computes exp(score - lse), which must be 0 there.
    """
    return lse.masked_fill(lse == -math.inf, math.inf)


def last_contiguous(t):
    """t, or a copy where its last dimension is not contiguous: autograd hands in gradients with strides of 0, say."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _zero_beyond(grad, end):
    rows = torch.arange(grad.shape[0], device=grad.device)
    return grad.masked_fill((rows >= end)[:, None, None], 0.0)


def _run(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, deterministic):
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    lse = flash_lse(lse).contiguous()
    pad = -head_dim % _MULTIPLE
    tensors = dout, q, k, v, out
    if pad:
        tensors = tuple(F.pad(t, (0, pad)) for t in tensors)
    dout, q, k, v, out = map(last_contiguous, tensors)
    unused = torch.zeros((2,), dtype=torch.uint64, device=q.device)  # dropout's state
    with _Deterministic(deterministic):
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            max_q,
            max_k,
            0.0,
            causal,
            unused,
            unused,
            scale=scale,
            window_size_left=None if left < 0 else left,
            window_size_right=0 if causal else None if right < 0 else right,
        )
    return (dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim]) if pad else (dq, dk, dv)


class _Deterministic:
    """torch's switch, on for a call that asks for it."""

    def __init__(self, on):
        self._on = on and not torch.compiler.is_compiling()

    def __enter__(self):
        if self._on:
            self._before = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            torch.use_deterministic_algorithms(True)  # warn_only would leave the kernel as it is

    def __exit__(self, *_):
        if self._on:
            torch.use_deterministic_algorithms(self._before[0], warn_only=self._before[1])
