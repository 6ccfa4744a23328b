"""Chatterbox's sampling, in its order: penalty, temperature, min-p, top-p, draw."""

import torch
from torch import Tensor

from vivace.chatterbox.request import Request


def sample(logits: Tensor, seen: Tensor, request: Request, generator: torch.Generator | None) -> Tensor:
    """The next token.

    Args:
        logits: (1, vocab) float32, guided.
        seen: (1, n) int64, tokens so far with the start token.
        generator: None: torch's default one.

    Returns:
        (1, 1) int64. temperature 0 takes the likeliest token.
    """
    scores = logits.gather(1, seen)
    penalty = request.repetition_penalty
    logits = logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))
    if request.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if request.temperature != 1.0:
        logits = logits / request.temperature
    if request.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < request.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    if request.top_p < 1:
        ordered, order = logits.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - request.top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator)
