"""The calls of attention: dense, of packed sequences, over a KV cache."""

import torch

from vivace.ops._loaded import operators
from vivace.ops._tensors import check_tensors, draw_rng_state, last_contiguous, mutated, no_gradient, window_pair

_attention = operators.attention.default
_attention_varlen = operators.attention_varlen.default
_attention_with_kvcache = operators.attention_with_kvcache.default
# What OpOverload.__call__ calls and no more, a Python frame less: modes, subclasses and autograd stand behind it. The
# name is private to torch, so without it the overload; compilers, which know overloads only, take that one anyway.
_attention_with_kvcache_now = getattr(_attention_with_kvcache, "_op", _attention_with_kvcache)
_NO_WINDOW = (-1, -1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention without the score matrix in memory: FlashAttention (arXiv 2205.14135, 2307.08691).

    Query i stands at key i + seqlen_k - seqlen_q (bottom-right alignment). A row that sees no key gives 0.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim up to 256.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads, head h reads h // (heads / heads_kv).
        v: (batch, seqlen_k, heads_kv, head_dim_v), head_dim_v up to 256.
        softmax_scale: of q . k; None: head_dim ** -0.5.
        causal: query i sees no key after its own position; sets the window's right side to 0.
        window_size: keys before and after the query's position that it sees, both inclusive; -1: all.
        softcap: above 0, scores become softcap * tanh(scores / softcap).
        alibi_slopes: float32 (heads,) or (batch, heads); adds -slope * distance to the scores (arXiv 2108.12409).
        bias: added to the scores; 4 dimensions that broadcast to (batch, heads, seqlen_q, seqlen_k), of float32 or q's
            dtype; or bool, where False hides the key.
        sinks: float32 (heads,), one more logit in the softmax's denominator, without a value.
        dropout_p: probability that a weight is dropped, 0 <= p < 1.
        rng_state: int64 (2,), seed and offset of dropout, on q's device; None: drawn from torch's generator.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) of q's dtype; with return_lse also float32 (batch, heads, seqlen_q),
        the natural logarithm, -inf where a row sees nothing. Differentiable in q, k, v, bias and sinks.
    """
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(q)
    options = softmax_scale, causal
    # Arguments are converted one by one, 0.2 us each: those that are as they are anyway stay at home.
    if not (
        rng_state is None
        and sinks is None
        and bias is None
        and alibi_slopes is None
        and softcap == 0.0
        and dropout_p == 0.0
        and window_size == _NO_WINDOW
    ):
        window = window_pair("attention", window_size)
        options = softmax_scale, causal, *window, softcap, alibi_slopes, bias, sinks, dropout_p, rng_state
    out, lse = _run(_attention, q, k, v, options, (bias, sinks))
    return (out, lse) if return_lse else out


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch of sequences of different lengths, packed one after the other. See `attention`.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, heads_kv, head_dim), or with block_table pages (num_pages, page_size, heads_kv, head_dim).
        v: as k, with head_dim_v.
        cu_seqlens_q: int32 (batch + 1,), where each sequence's queries start; the last entry is the end.
        cu_seqlens_k: int32 (batch + 1,), the same for keys; with block_table only its differences, the lengths, count.
        max_seqlen_q: the longest query sequence.
        max_seqlen_k: the longest key sequence.
        seqused_q: int32 (batch,), rows in use of each query sequence; None: all. Rows beyond give 0.
        seqused_k: int32 (batch,), keys in use of each sequence; None: all.
        block_table: int32 (batch, max_pages), the page of each page_size keys of a sequence. No gradient then.

    Returns:
        out (total_q, heads, head_dim_v); with return_lse also float32 (heads, total_q).
    """
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(q)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
    window = window_pair("attention_varlen", window_size)
    options = softmax_scale, causal, *window, softcap, alibi_slopes, None, sinks, dropout_p, rng_state
    out, lse = _run(_attention_varlen, q, k, v, (*lengths, *options), (sinks,))
    return (out, lse) if return_lse else out


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: torch.Tensor | int | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int = 0,
    probe: torch.Tensor | None = None,
    probe_head: int = -1,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a KV cache, after appending new keys and values to it: prefill, chunked prefill and decoding.

    Args:
        q: (batch, seqlen_q, heads, head_dim), or with cu_seqlens_q (total_q, heads, head_dim).
        k_cache: (cache_rows, capacity, heads_kv, head_dim), or with block_table pages (num_pages, page_size, heads_kv,
            head_dim). Written in place where k is given.
        v_cache: as k_cache, with head_dim_v.
        k: keys to append, (batch, seqlen_new, heads_kv, head_dim), or with cu_seqlens_q (total_q, heads_kv, head_dim).
        v: values to append, as k.
        cache_seqlens: int32 (batch,) or an int, keys in each row before the append; not advanced. None: the whole
            capacity. Appending past the capacity is an error on the CPU; on CUDA, where that would need a
            synchronisation, such keys are neither written nor seen.
        rotary_cos: (max_position, rotary_dim / 2), float32 or q's dtype: rotates k at cache_seqlens + t before the
            append, and q at cache_seqlens + i if the call is causal or has a window, otherwise at cache_seqlens.
        rotary_sin: as rotary_cos.
        rotary_interleaved: pairs (2i, 2i + 1), as GPT-J; otherwise (i, i + rotary_dim / 2), as NeoX and Llama.
        cache_batch_idx: int32 (batch,), the cache row of each batch entry; None: its own number. Entries that append
            have rows of their own.
        cache_leftpad: int32 (batch,), first valid key of each row.
        block_table: int32 (batch, max_pages).
        cu_seqlens_q: int32 (batch + 1,): q, k and v are packed one sequence after the other.
        max_seqlen_q: the longest query sequence, with cu_seqlens_q.
        num_splits: of the keys over the GPU's processors; 0: chosen.
        probe: float32 (batch, probe_rows, capacity), contiguous: gets the probabilities of head probe_head for the last
            probe_rows queries of each row, 0 at and past the row's length.
        probe_head: the head that probe reads.
        softmax_scale, causal, window_size, softcap, alibi_slopes, sinks, return_lse: as in `attention`.

    Returns:
        out of q's layout with head_dim_v; with return_lse also float32 (batch, heads, seqlen_q) or (heads, total_q).
        Not differentiable.
    """
    if torch.is_grad_enabled():
        no_gradient("attention_with_kvcache", q, k_cache, v_cache, k, v)
    if isinstance(cache_seqlens, int):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    compiling = torch.compiler.is_compiling()
    if compiling or not (q.is_contiguous() and _contiguous_or_none(k) and _contiguous_or_none(v)):
        q, k, v = map(last_contiguous, (q, k, v))
    # As in `attention`: what is as it is anyway is not handed over. One query sees every key, causal or not; a compiler
    # is not asked, which would have to guard the answer.
    if causal and not compiling and rotary_cos is None and cu_seqlens_q is None and q.dim() == 4 and q.shape[1] == 1:
        causal = False
    options = ()
    if not (
        probe is None
        and num_splits == 0
        and rotary_interleaved
        and sinks is None
        and alibi_slopes is None
        and softcap == 0.0
    ):
        window = window_pair("attention_with_kvcache", window_size)
        options = *window, softcap, alibi_slopes, sinks, rotary_interleaved, num_splits, probe, probe_head
    elif window_size != _NO_WINDOW:
        options = window_pair("attention_with_kvcache", window_size)
    if (
        options
        or causal
        or softmax_scale is not None
        or block_table is not None
        or rotary_cos is not None
        or rotary_sin is not None
        or cache_batch_idx is not None
        or cache_leftpad is not None
        or cu_seqlens_q is not None
        or max_seqlen_q != 0
    ):
        options = (
            rotary_cos,
            rotary_sin,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            cu_seqlens_q,
            max_seqlen_q,
            softmax_scale,
            causal,
            *options,
        )
    op = _attention_with_kvcache if compiling else _attention_with_kvcache_now
    out, lse = op(q, k_cache, v_cache, k, v, cache_seqlens, *options)
    if k is not None and not compiling:
        mutated(k_cache, v_cache)
    return (out, lse) if return_lse else out


def attention_kernel() -> str:
    """The implementation that this thread's last attention call ran on: "cpu", "attention_decode",
    "attention_forward_sm90", "attention_forward_sm80" or "attention_forward_generic"; "" before the first."""
    return operators.attention_kernel()


def _run(op, q, k, v, options, others):
    """op(q, k, v, *options), past autograd's kernel in Python where no gradient can be asked for. others: what is
    differentiable too, or None."""
    if not _all_contiguous(q, k, v):
        check_tensors(op.name().removeprefix("vivace::"), q=q, k=k, v=v)
        q, k, v = map(last_contiguous, (q, k, v))
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(q, k, v, *options)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or any(t is not None and t.requires_grad for t in others)
    ):
        return op(q, k, v, *options)
    below = torch._C._AutoDispatchBelowAutograd()  # from here to its end, also without `with`, which costs 1 us
    try:
        return op(q, k, v, *options)
    finally:
        del below


def _all_contiguous(q, k, v):
    """Whether the last dimensions are. False for what is no tensor, or has no dimensions."""
    try:
        return q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1
    except (AttributeError, IndexError):
        return False


def _contiguous_or_none(t):
    return t is None or t.is_contiguous()
