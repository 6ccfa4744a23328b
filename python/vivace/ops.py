"""The operators, as Python functions over torch.ops.vivace. Importing this module loads the operator library.

The functions add to the operators: keyword arguments, tensors copied where their last dimension is not contiguous, a
window as a pair, and an error where a gradient is asked of an operator that has none. TorchScript, C++ and
torch.compile may call torch.ops.vivace directly; the checks of shapes and dtypes, and their words, are the same.

All raise RuntimeError with a text such as "vivace.attention: k has head_dim 96, q has 64 (k: [..], q: [..])".
Floating point tensors are float32, float16 or bfloat16 (on the CPU float64 too), computed in float32 and rounded once.
"""

import json
from collections.abc import Sequence

import torch

from vivace import library

library.load()

_ops = torch.ops.vivace
_attention = _ops.attention.default
_attention_varlen = _ops.attention_varlen.default
_attention_with_kvcache = _ops.attention_with_kvcache.default
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
        rng_state = _draw_rng_state(q)
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
        options = softmax_scale, causal, *window_size, softcap, alibi_slopes, bias, sinks, dropout_p, rng_state
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
        rng_state = _draw_rng_state(q)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
    options = softmax_scale, causal, *window_size, softcap, alibi_slopes, None, sinks, dropout_p, rng_state
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
            synchronisation, such keys are not written.
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
        _no_gradient("attention_with_kvcache", q, k_cache, v_cache, k, v)
    if isinstance(cache_seqlens, int):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    compiling = torch.compiler.is_compiling()
    if compiling or not (q.is_contiguous() and _contiguous_or_none(k) and _contiguous_or_none(v)):
        q, k, v = map(_last_contiguous, (q, k, v))
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
        options = *window_size, softcap, alibi_slopes, sinks, rotary_interleaved, num_splits, probe, probe_head
    elif window_size != _NO_WINDOW:
        options = window_size
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
        _mutated(k_cache, v_cache)
    return (out, lse) if return_lse else out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Args:
        x: (..., width).
        weight: (width,) of x's dtype.
        eps: added to the mean of squares.

    Returns:
        x's shape and dtype, contiguous. Differentiable in x and weight.
    """
    return _ops.rms_norm(_rows_even(x), weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """residual += x, in place, then rms_norm of residual: one pass over memory. Not differentiable.

    Args:
        x: (..., width).
        residual: x's shape and dtype; written in place.
        weight: (width,) of x's dtype.

    Returns:
        The norm: x's shape and dtype, contiguous.
    """
    _no_gradient("add_rms_norm", x, residual, weight)
    out = _ops.add_rms_norm(_rows_even(x), residual, weight, eps)
    _mutated(residual)
    return out


def rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the first rotary_dim dimensions of each head; the rest is copied.

    Args:
        x: (tokens, heads, head_dim) or (batch, seqlen, heads, head_dim).
        cos: (max_position, rotary_dim / 2), float32 or x's dtype.
        sin: as cos.
        positions: int32 or int64, (tokens,) or (batch, seqlen); None: 0, 1, ... in each sequence.
        interleaved: pairs (2i, 2i + 1), as GPT-J; otherwise (i, i + rotary_dim / 2), as NeoX and Llama.

    Returns:
        x's shape and dtype, contiguous. Differentiable in x.
    """
    return _ops.rotary_embedding(_last_contiguous(x), cos, sin, positions, interleaved)


def rotary_embedding_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """`rotary_embedding` in place; returns x. Not differentiable."""
    _no_gradient("rotary_embedding_", x)
    _ops.rotary_embedding_(x, cos, sin, positions, interleaved)
    _mutated(x)
    return x


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the last dimension is [gate | up]: SwiGLU's activation (arXiv 2002.05202).

    Args:
        gate_up: (..., 2 * width).

    Returns:
        (..., width), contiguous. Differentiable.
    """
    return _ops.silu_gate(_rows_even(gate_up))


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seen: torch.Tensor,
    cfg_weight: torch.Tensor,
    temperature: torch.Tensor,
    repetition_penalty: torch.Tensor,
    min_p: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """Draws one token for each request, in Chatterbox's order: classifier-free guidance, repetition penalty,
    temperature, top-k, min-p, top-p, softmax, draw. A request's token depends on its own row, parameters, seed and step
    alone, and is the same on CPU and CUDA: Philox4x32-10 (Salmon et al., SC 2011), an exponential race.

    Args:
        logits: (rows, vocab), float32, float16 or bfloat16.
        rows: int32 (requests, 2), each request's rows of logits: conditional and unconditional (-1: none).
        seen: uint8 or bool (requests, vocab), nonzero where a token was generated before; the drawn one is marked.
        cfg_weight: float32 (requests,); logits are cond + cfg_weight * (cond - uncond).
        temperature: float32 (requests,); 0: the largest logit.
        repetition_penalty: float32 (requests,), more than 0; 1: off.
        min_p: float32 (requests,); drops what is less likely than min_p times the likeliest. 0: off.
        top_p: float32 (requests,); keeps the likeliest that together reach top_p. 1: off.
        top_k: int32 (requests,); keeps the k largest. 0: off.
        seed: int64 (requests,).
        step: int64 (requests,), the token's number in its request.

    Returns:
        int64 (requests,). Not differentiable.
    """
    _no_gradient("sample", logits)
    tokens = _ops.sample(
        logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k, seed, step
    )
    _mutated(seen)
    return tokens


def sample_advance(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seen: torch.Tensor,
    cfg_weight: torch.Tensor,
    temperature: torch.Tensor,
    repetition_penalty: torch.Tensor,
    min_p: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cache_seqlens: torch.Tensor,
    advance: torch.Tensor,
    last_position: int,
    history: torch.Tensor | None = None,
    turn: torch.Tensor | None = None,
) -> None:
    """`sample`, and all that has to move on before the next `decode_step`, in one kernel: with decode_step it makes a
    step that a CUDA graph can repeat without the host.

    Args:
        logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k, seed: as in `sample`; a
            request whose first row is negative is padding, and nothing of it is read or written.
        step: int64 (requests,), the token's number in its request; advance is added to it.
        tokens: int64 (requests,); receives the drawn tokens.
        positions: int64 (requests,); advance is added, up to last_position.
        cache_seqlens: int32 (rows of logits,); advance is added to the lengths of each request's rows.
        advance: int64 (requests,), 1; 0: the request stays where it is.
        last_position: the largest position there is.
        history: int64 (slots, requests) or None; each request's token is also written to history[turn % slots]. With
            the other tensors on CUDA it may be pinned memory of the host, which then sees tokens without a copy.
        turn: int64 (requests,), given with history; 1 is added.
    """
    _no_gradient("sample_advance", logits)
    _ops.sample_advance(
        logits,
        rows,
        seen,
        cfg_weight,
        temperature,
        repetition_penalty,
        min_p,
        top_p,
        top_k,
        seed,
        step,
        tokens,
        positions,
        cache_seqlens,
        advance,
        last_position,
        history,
        turn,
    )
    _mutated(seen, step, tokens, positions, cache_seqlens, *(t for t in (history, turn) if t is not None))


def sampling_probs(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seen: torch.Tensor,
    cfg_weight: torch.Tensor,
    temperature: torch.Tensor,
    repetition_penalty: torch.Tensor,
    min_p: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
) -> torch.Tensor:
    """The distribution that `sample` draws from: float32 (requests, vocab). Arguments as there; `seen` is only read."""
    _no_gradient("sampling_probs", logits)
    return _ops.sampling_probs(logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k)


def decode_step(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    row_request: torch.Tensor,
    speech_emb: torch.Tensor,
    speech_pos_emb: torch.Tensor,
    input_norm: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    post_norm: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    norm: torch.Tensor,
    head: torch.Tensor,
    rotary_cos: torch.Tensor,
    rotary_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor,
    workspace: torch.Tensor,
    eps: float = 1e-5,
    probes: torch.Tensor | None = None,
    probe_layers: Sequence[int] = (),
    probe_heads: Sequence[int] = (),
    family: int = 0,
) -> torch.Tensor:
    """One token of each row through a whole Llama decoder (RMSNorm, rotary attention over a KV cache, SwiGLU): from
    token to logits in one operator, with the weights of all layers stacked. Tokens, positions, lengths and cache rows
    are read on the device, so that a captured step serves every length.

    A row appends its key and value at cache_seqlens, which the caller advances (`sample_advance`), and attends to all
    keys up to its own. A row at capacity writes nothing, and its logits mean nothing. A row's result does not depend on
    the other rows, bit for bit, as long as the same kernels run (`family`).

    Args:
        tokens, positions: int64 (requests,), each request's last token and its position in speech_pos_emb.
        row_request: int64 (rows,), the request whose token a row embeds.
        speech_emb: (tokens, hidden). speech_pos_emb: (positions, hidden). Their sum is the row's input.
        input_norm, post_norm: (layers, hidden), before attention and before the MLP.
        qkv: (layers, (heads + 2 * heads_kv) * head_dim, hidden), rows q, k, v.
        out: (layers, hidden, heads * head_dim).
        gate_up: (layers, 2 * intermediate, hidden), rows gate, up. down: (layers, hidden, intermediate).
        norm: (hidden,), the final one. head: (vocab, hidden).
        rotary_cos, rotary_sin: (at least capacity, head_dim / 2), float32 or the weights' dtype; halves are rotated.
        k_cache, v_cache: (layers, cache_rows, capacity, heads_kv, head_dim), written in place; any strides but the
            last. The kernels like a head's keys side by side: (layers, cache_rows, heads_kv, capacity,
            head_dim).transpose(2, 3).
        cache_seqlens: int32 (rows,), keys before the step.
        cache_batch_idx: int32 (rows,), the cache row of each row; negative: padding, which does nothing.
        workspace: uint8, `decode_step_workspace` bytes, zeroed once and kept between the calls of one stream.
        eps: of the norms.
        probes: float32 (probes, at least rows, 1, width) or None: receives the attention probabilities of single heads
            over the keys, 0 beyond them. probe_layers, probe_heads: which; at most 8.
        family: 0: the fastest for so many rows, 1: one persistent kernel for few rows, 2: a chain of kernels, 3: one
            persistent kernel for many rows, whose halves take turns ("split").

    Returns:
        float32 (rows, vocab). Not differentiable.

    Raises:
        RuntimeError: an argument does not fit, or (CUDA) no kernel takes the shape: decode_step_workspace asks first.
    """
    _no_gradient("decode_step", speech_emb, qkv, out, gate_up, down, head)
    logits = _ops.decode_step(
        tokens,
        positions,
        row_request,
        speech_emb,
        speech_pos_emb,
        input_norm,
        qkv,
        out,
        post_norm,
        gate_up,
        down,
        norm,
        head,
        rotary_cos,
        rotary_sin,
        k_cache,
        v_cache,
        cache_seqlens,
        cache_batch_idx,
        workspace,
        eps,
        probes,
        probe_layers,
        probe_heads,
        family,
    )
    _mutated(k_cache, v_cache, workspace, *(() if probes is None else (probes,)))
    return logits


def decode_step_workspace(
    qkv: torch.Tensor,
    down: torch.Tensor,
    head: torch.Tensor,
    k_cache: torch.Tensor,
    rows: int,
    probes: bool = False,
    family: int = 0,
) -> int:
    """Bytes of `decode_step`'s workspace for up to `rows` rows: 0 on the CPU, -1 where no CUDA kernel takes the shape.
    One workspace serves calls of any number of rows up to `rows`."""
    return _ops.decode_step_workspace(qkv, down, head, k_cache, rows, probes, family)


def decode_step_kernel() -> str:
    """The implementation that this thread's last decode_step ran on: "cpu", "step_persistent", "step_chain" or
    "step_split"; "" before the first."""
    return _ops.decode_step_kernel()


def force_arch(arch: int) -> int:
    """Chooses the CUDA kernels for the whole process: 0 by the device, 80 mma.sync (sm_80 and newer), 90 Hopper's, -1
    the generic ones. The environment's VIVACE_ARCH is the initial value.

    Returns:
        The previous value.
    """
    return _ops.force_arch(arch)


def build_info() -> dict:
    """What the operator library was built for: version, cuda (toolkit, or None for CPU only), architectures,
    torch_target (the oldest torch it runs with), torch_built, operators (version of the schemas)."""
    return json.loads(_ops.build_info())


def attention_kernel() -> str:
    """The implementation that this thread's last attention call ran on: "cpu", "attention_decode",
    "attention_forward_sm90", "attention_forward_sm80" or "attention_forward_generic"; "" before the first."""
    return _ops.attention_kernel()


def _run(op, q, k, v, options, others):
    """op(q, k, v, *options), past autograd's kernel in Python where no gradient can be asked for. others: what is
    differentiable too, or None."""
    if not _all_contiguous(q, k, v):
        q, k, v = map(_last_contiguous, (q, k, v))
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
    """Whether the last dimensions are; what is no tensor, or has no dimensions, is the operator's to complain of."""
    try:
        return q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1
    except (AttributeError, IndexError):
        return False


def _contiguous_or_none(t):
    return t is None or t.is_contiguous()


def _last_contiguous(t):
    return t if t is None or t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _rows_even(t):
    """t, or a copy where its rows are not one stride apart."""
    if t.dim() == 0 or t.is_contiguous():
        return t
    if t.stride(-1) != 1:
        return t.contiguous()
    for d in range(t.dim() - 3, -1, -1):
        if t.shape[d] != 1 and t.stride(d) != t.stride(d + 1) * t.shape[d + 1]:
            return t.contiguous()
    return t


def _draw_rng_state(q):
    return torch.randint(0, 2**31, (2,), dtype=torch.int64, device=q.device)


def _no_gradient(name, *tensors):
    if not torch.is_grad_enabled():
        return
    for t in tensors:
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"vivace.{name}: it has no gradient, but an argument requires one; call it under torch.no_grad()"
            )


def _mutated(*tensors):
    # The operator writes behind autograd's back: a saved tensor that was overwritten shall be noticed.
    if torch.compiler.is_compiling():
        return
    if torch.is_inference_mode_enabled():
        tensors = tuple(t for t in tensors if not t.is_inference())
    torch.autograd.graph.increment_version(tensors)
