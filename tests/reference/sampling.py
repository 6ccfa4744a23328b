"""One sampling step in Chatterbox's order: guidance, penalty, temperature, top-k, min-p, top-p, softmax, draw."""

from typing import NamedTuple

import numpy as np

from .philox import sampling_uniforms


class Distribution(NamedTuple):
    probs: np.ndarray  # (vocab,) float64
    margin: float  # how far the closest filter decision was from going the other way, relative


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def distribution(
    cond, uncond, seen, cfg_weight=0.0, temperature=1.0, repetition_penalty=1.0, min_p=0.0, top_p=1.0, top_k=0
):
    """The final probabilities of one request. cond, uncond (or None), seen: (vocab,)."""
    logits = np.asarray(cond, dtype=np.float64)
    if uncond is not None:
        logits = logits + cfg_weight * (logits - np.asarray(uncond, dtype=np.float64))
    penalised = np.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    logits = np.where(np.asarray(seen) != 0, penalised, logits)
    if temperature == 0:
        order = np.sort(logits)
        probs = np.zeros_like(logits)
        probs[int(np.argmax(logits))] = 1.0
        return Distribution(probs, float(order[-1] - order[-2]) if len(order) > 1 else 1.0)
    logits = logits / temperature
    kept = np.ones(len(logits), dtype=bool)
    margin = np.inf

    def decide(value, threshold, scale):
        nonlocal margin
        margin = min(margin, float(np.min(np.abs(value - threshold) / scale, initial=np.inf)))

    if 0 < top_k < len(logits):
        order = np.sort(logits)[::-1]
        kept &= logits >= order[top_k - 1]
        decide(order[top_k - 1], order[top_k], 1.0)
    if min_p > 0:
        p = softmax(np.where(kept, logits, -np.inf))
        decide(p[kept], min_p * p.max(), min_p * p.max())
        kept &= p >= min_p * p.max()
    if top_p < 1:
        p = softmax(np.where(kept, logits, -np.inf))
        order = np.sort(p[kept])
        mass = np.cumsum(order)
        at_most = mass[np.searchsorted(order, p, side="right") - 1]  # the mass of probabilities <= p
        decide(at_most[kept], 1.0 - top_p, 1.0)
        kept &= (at_most > 1.0 - top_p) | (p == p.max())
    return Distribution(softmax(np.where(kept, logits, -np.inf)), margin)


class Draw(NamedTuple):
    token: int
    margin: float  # relative lead of the winner over the second


def draw(probs, seed, step):
    """The winner of an exponential race: argmin of -log(u_i) / p_i, u_i from (seed, step, i)."""
    u = sampling_uniforms(seed, step, len(probs))
    with np.errstate(divide="ignore"):
        arrival = np.where(probs > 0, -np.log(u) / np.where(probs > 0, probs, 1.0), np.inf)
    order = np.argsort(arrival, kind="stable")
    if len(order) == 1 or np.isinf(arrival[order[1]]):
        return Draw(int(order[0]), np.inf)
    return Draw(int(order[0]), float((arrival[order[1]] - arrival[order[0]]) / max(arrival[order[1]], 1e-300)))
