"""flash-attn's functions of packed sequences of different lengths, over our operators; signatures of version 2.8."""

from vivace import ops
from vivace.flash_attn.arguments import backward_mode, check_dtype, pair, softcap_of
from vivace.flash_attn.functions import _check_packed
from vivace.flash_attn.probabilities import s_dmask_varlen
from vivace.ops._tensors import draw_rng_state
from vivace.torch_backward import flash_lse


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention of q (total_q, heads, head_dim) over k and v (total_k, heads_kv, head_dim), sequence by sequence.

    Args:
        cu_seqlens_q: int32 (batch + 1,), where each sequence's queries start; the last entry is the end.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: the longest query sequence, int or 0-d tensor.
        max_seqlen_k: the longest key sequence.
        block_table: int32 (batch, max_pages): k and v are pages (num_pages, page_size, heads_kv, head_dim), and there
            is no gradient.
        The rest as in `flash_attn_func`.

    Returns:
        out (total_q, heads, head_dim); with return_attn_probs (out, softmax_lse float32 (heads, total_q), S_dmask).
    """
    return _packed(
        "flash_attn_varlen_func",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of qkv (total, 3, heads, head_dim)."""
    _check_packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3, "(total, 3, heads, head_dim)")
    return _packed(
        "flash_attn_varlen_qkvpacked_func",
        *qkv.unbind(dim=1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of q and kv (total_k, 2, heads_kv, head_dim)."""
    _check_packed("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2, "(total_k, 2, heads_kv, head_dim)")
    return _packed(
        "flash_attn_varlen_kvpacked_func",
        q,
        *kv.unbind(dim=1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _packed(
    function,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    scale,
    causal,
    window_size,
    softcap,
    alibi_slopes,
    deterministic,
    return_attn_probs,
    block_table=None,
):
    check_dtype(function, q)
    window, softcap = pair(window_size), softcap_of(softcap)
    max_seqlen_q, max_seqlen_k = int(max_seqlen_q), int(max_seqlen_k)
    rng_state = draw_rng_state(q) if dropout_p > 0.0 else None
    with backward_mode(deterministic, q, k, v):
        result = ops.attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            block_table=block_table,
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
    if dropout_p > 0.0 and block_table is None:
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        options = scale, causal, window, softcap, alibi_slopes
        probabilities = s_dmask_varlen(q, k, lse, *lengths, *options, dropout_p, rng_state)
    else:
        probabilities = q.new_empty(0)
    return out, flash_lse(lse), probabilities
