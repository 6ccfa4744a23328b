"""flash-attn's functions of dense batches and of KV caches, over our operators; signatures and defaults of version 2.8.

Differences, all in what is accepted besides: head_dim need not be a multiple of 8 (up to 256), v may have another
head_dim, a page may have any size, and tensors may be on the CPU, there also in float32 and float64.
"""

import torch

from vivace import ops
from vivace.flash_attn.arguments import backward_mode, check_dtype, pair, softcap_of
from vivace.flash_attn.probabilities import s_dmask
from vivace.ops._tensors import draw_rng_state
from vivace.torch_backward import flash_lse


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of q (batch, seqlen_q, heads, head_dim) over k and v (batch, seqlen_k, heads_kv, head_dim).

    Args:
        dropout_p: probability of dropping a weight; 0 in evaluation.
        softmax_scale: None: head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q (bottom-right alignment).
        window_size: (left, right) keys around that position, inclusive; -1: all.
        softcap: above 0, scores become softcap * tanh(scores / softcap).
        alibi_slopes: float32 (heads,) or (batch, heads).
        deterministic: a backward with the same bits every time.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, heads, head_dim), 0 in rows that see no key; with return_attn_probs (out, softmax_lse
        float32 (batch, heads, seqlen_q), natural logarithm, +inf in such rows, S_dmask: with dropout the
        probabilities, negative where dropped, (batch, heads, seqlen_q, seqlen_k) rounded up to 128; else empty).

    Raises:
        RuntimeError: dtype, shape or device do not fit; the text says which argument.
    """
    return _dense(
        "flash_attn_func",
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of qkv (batch, seqlen, 3, heads, head_dim)."""
    _check_packed("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3, "(batch, seqlen, 3, heads, head_dim)")
    return _dense(
        "flash_attn_qkvpacked_func",
        *qkv.unbind(dim=2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of q and kv (batch, seqlen_k, 2, heads_kv, head_dim)."""
    _check_packed("flash_attn_kvpacked_func", "kv", kv, 5, 2, "(batch, seqlen_k, 2, heads_kv, head_dim)")
    return _dense(
        "flash_attn_kvpacked_func",
        q,
        *kv.unbind(dim=2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention of q (batch, seqlen_q, heads, head_dim) over a cache, after writing k and v to it in place.

    Args:
        k_cache: (cache_rows, capacity, heads_kv, head_dim), or with block_table (num_pages, page_size, heads_kv,
            head_dim).
        v_cache: as k_cache.
        k: (batch, seqlen_new, heads_kv, head_dim), written at cache_seqlens; v likewise.
        rotary_cos: (positions, rotary_dim / 2); k is rotated at cache_seqlens + t, q at cache_seqlens + i if causal or
            with a window, else at cache_seqlens. rotary_interleaved: pairs (2i, 2i + 1), else halves.
        cache_seqlens: int or int32 (batch,), the keys there are before the call; it is not advanced.
        cache_batch_idx: int32 (batch,), each entry's row of the cache, with k no other's.
        cache_leftpad: int32 (batch,), its first key.
        block_table: int32 (batch, max_pages).
        num_splits: of the keys; 0: chosen.
        The rest as in `flash_attn_func`. No gradient.

    Returns:
        out as q; with return_softmax_lse (out, float32 (batch, heads, seqlen_q)).
    """
    check_dtype("flash_attn_with_kvcache", q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise RuntimeError(
                f"vivace.flash_attn.flash_attn_with_kvcache: {name} must have a contiguous last dimension"
            )
    with torch.no_grad():
        out, lse = ops.attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=cache_seqlens,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            block_table=block_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=pair(window_size),
            softcap=softcap_of(softcap),
            alibi_slopes=alibi_slopes,
            num_splits=num_splits,
            return_lse=True,
        )
    return (out, flash_lse(lse)) if return_softmax_lse else out


def _dense(
    function, q, k, v, dropout_p, scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
):
    check_dtype(function, q)
    window, softcap = pair(window_size), softcap_of(softcap)
    rng_state = draw_rng_state(q) if dropout_p > 0.0 else None
    with backward_mode(deterministic, q, k, v):
        result = ops.attention(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=causal,
            window_size=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            rng_state=rng_state,
            return_lse=return_attn_probs,
        )
    if not return_attn_probs:
        return result
    out, lse = result
    if dropout_p > 0.0:
        probabilities = s_dmask(q, k, lse, scale, causal, window, softcap, alibi_slopes, dropout_p, rng_state)
    else:
        probabilities = q.new_empty(0)
    return out, flash_lse(lse), probabilities


def _check_packed(function, name, tensor, dims, count, layout):
    if tensor.dim() != dims or tensor.shape[-3] != count:
        raise RuntimeError(f"vivace.flash_attn.{function}: {name} has shape {list(tensor.shape)}, expected {layout}")
