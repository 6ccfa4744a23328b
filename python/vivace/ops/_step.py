"""A decoder's whole token step as one operator."""

from collections.abc import Sequence

import torch

from vivace.ops._loaded import operators
from vivace.ops._tensors import mutated, no_gradient


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
            persistent kernel for many rows, whose parts take turns ("split"), 4: one persistent kernel for up to 64
            rows, over a mesh of thread blocks ("mesh").

    Returns:
        float32 (rows, vocab). Not differentiable.

    Raises:
        RuntimeError: an argument does not fit, or (CUDA) no kernel takes the shape: decode_step_workspace asks first.
    """
    no_gradient("decode_step", speech_emb, qkv, out, gate_up, down, head)
    logits = operators.decode_step(
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
    mutated(k_cache, v_cache, workspace, *(() if probes is None else (probes,)))
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
    return operators.decode_step_workspace(qkv, down, head, k_cache, rows, probes, family)


def decode_step_kernel() -> str:
    """The implementation that this thread's last decode_step ran on: "cpu", "step_persistent", "step_chain",
    "step_split" or "step_mesh"; "" before the first."""
    return operators.decode_step_kernel()
