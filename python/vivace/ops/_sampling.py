"""The draw of a token, alone and with all that moves on after it."""

import torch

from vivace.ops._loaded import operators
from vivace.ops._tensors import mutated, no_gradient


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
    no_gradient("sample", logits)
    tokens = operators.sample(
        logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k, seed, step
    )
    mutated(seen)
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
    no_gradient("sample_advance", logits)
    operators.sample_advance(
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
    mutated(seen, step, tokens, positions, cache_seqlens, *(t for t in (history, turn) if t is not None))


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
    no_gradient("sampling_probs", logits)
    return operators.sampling_probs(
        logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k
    )
