"""What one call of T3.inference asks for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

#: on_tokens(index, new_tokens, tokens_so_far, max_new_tokens); returning False ends the request.
TokenCallback = Callable[[int, list[int], int, int], bool | None]
#: progress(tokens_so_far), from the thread that waits, every now and then and at the end.
Progress = Callable[[int], None]

#: Arguments of T3.inference without effect on its loop in any version: there are no beams.
_IGNORED = {"length_penalty"}
#: Arguments that the loop here does not have, and the values that ask for nothing.
_UNSUPPORTED = {"prepend_prompt_speech_tokens": (None,), "num_return_sequences": (1, None)}


@dataclass(frozen=True)
class Request:
    """A voice, a text and sampling options.

    Attributes:
        t3_cond: Chatterbox's T3Cond, as it came.
        text_tokens: ids with start and stop.
        seed: of its own generator; None: it draws from torch's default generator.
        progress: for a bar: unlike on_tokens it costs the engine nothing, and cannot end the request.
    """

    t3_cond: Any
    text_tokens: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    min_p: float
    repetition_penalty: float
    cfg_weight: float
    stop_on_eos: bool = True
    seed: int | None = None
    index: int = 0
    on_tokens: TokenCallback | None = None
    progress: Progress | None = None

    @property
    def guided(self) -> bool:
        return self.cfg_weight > 0

    def with_seed(self, seed: int | None, index: int) -> "Request":
        return replace(self, seed=seed, index=index)


@dataclass(frozen=True)
class Outcome:
    """Speech tokens without the stop token, and "stop", "length" or "cancelled"."""

    tokens: list[int]
    finish_reason: str


def request_of(arguments: Mapping[str, Any], t3: nn.Module, on_tokens: TokenCallback | None = None) -> Request:
    """The request of a call of T3.inference.

    Args:
        arguments: by name, defaults applied.

    Raises:
        ValueError: an argument is out of range or asks for what the loop does not have; names it.
    """
    known = dict(arguments)
    for name in _IGNORED:
        known.pop(name, None)
    for name, nothing in _UNSUPPORTED.items():
        value = known.pop(name, nothing[0])
        if not any(value is none or value == none for none in nothing):
            raise ValueError(f"vivace: T3.inference: {name} is not supported by the accelerated loop")
    hp = t3.hp
    initial = known.pop("initial_speech_tokens", None)
    if initial is not None and not bool((torch.as_tensor(initial) == hp.start_speech_token).all().item()):
        raise ValueError(
            f"vivace: T3.inference: initial_speech_tokens is not supported by the accelerated loop beyond the start "
            f"token {hp.start_speech_token}; vivace.restore() first"
        )
    max_new_tokens = known.pop("max_new_tokens", None)
    do_sample, cfg_weight = known.pop("do_sample", True), float(known.pop("cfg_weight", 0.0))
    request = Request(
        t3_cond=known.pop("t3_cond"),
        text_tokens=text_row(known.pop("text_tokens"), hp),
        max_new_tokens=hp.max_speech_tokens if max_new_tokens is None else int(max_new_tokens),
        temperature=float(known.pop("temperature", 1.0)) if do_sample else 0.0,
        top_p=float(known.pop("top_p", 1.0)),
        min_p=float(known.pop("min_p", 0.0)),
        repetition_penalty=float(known.pop("repetition_penalty", 1.0)),
        cfg_weight=max(cfg_weight, 0.0) if cfg_weight == cfg_weight else cfg_weight,
        stop_on_eos=bool(known.pop("stop_on_eos", True)),
        on_tokens=on_tokens,
    )
    if known.keys() - {"temperature"}:
        raise ValueError(f"vivace: T3.inference: {', '.join(sorted(known))}: not known to the accelerated loop")
    check(request, hp)
    return request


def text_row(text_tokens: Any, hp: Any) -> list[int]:
    """The text of the guided row: text_tokens (n,), (1, n), or (2, n) as Chatterbox doubles it."""
    tokens = torch.atleast_2d(torch.as_tensor(text_tokens))
    if tokens.dim() != 2 or tokens.size(0) not in (1, 2) or tokens.is_floating_point():
        raise ValueError(
            f"vivace: T3.inference: text_tokens is {tokens.dtype} {list(tokens.shape)}, expected token ids (n,), "
            "(1, n) or (2, n)"
        )
    row = tokens[0].tolist()
    for name in ("start_text_token", "stop_text_token"):
        if getattr(hp, name) not in row:
            raise ValueError(f"vivace: T3.inference: text_tokens has no {name} ({getattr(hp, name)})")
    return row


def check(request: Request, hp: Any) -> None:
    limits = {
        "max_new_tokens": (1, hp.max_speech_tokens),
        "temperature": (0.0, 1e6),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "cfg_weight": (0.0, 1e6),
    }
    for name, (low, high) in limits.items():
        value = getattr(request, name)
        if not low <= value <= high:  # true of NaN too
            raise ValueError(f"vivace: T3.inference: {name} is {value}, expected {low} to {high}")
    if not 0 < request.repetition_penalty <= 1e6:
        raise ValueError(
            f"vivace: T3.inference: repetition_penalty is {request.repetition_penalty}, expected above 0 (1: none)"
        )


def speaker_of(cond: Any, size: int) -> Tensor:
    """speaker_emb (1, size) float32 on the CPU."""
    speaker = cond.speaker_emb
    if not torch.is_tensor(speaker) or speaker.numel() != size:
        raise ValueError(
            f"vivace: T3.inference: t3_cond.speaker_emb is {describe(speaker)}, expected {size} values: one voice"
        )
    return speaker.detach().float().cpu().reshape(1, size)


def prompt_of(cond: Any) -> Tensor:
    """cond_prompt_speech_tokens (1, P) int64 on the CPU."""
    prompt = cond.cond_prompt_speech_tokens
    if not torch.is_tensor(prompt) or prompt.numel() < 1 or prompt.numel() != prompt.shape[-1]:
        raise ValueError(
            f"vivace: T3.inference: t3_cond.cond_prompt_speech_tokens is {describe(prompt)}, expected (1, tokens)"
        )
    return prompt.detach().long().cpu().reshape(1, -1)


def exaggeration_of(cond: Any) -> float:
    emotion = cond.emotion_adv
    if torch.is_tensor(emotion):
        if emotion.numel() != 1:
            raise ValueError(f"vivace: T3.inference: t3_cond.emotion_adv is {describe(emotion)}, expected one value")
        return float(emotion.reshape(()).item())
    if emotion is None:
        raise ValueError("vivace: T3.inference: t3_cond.emotion_adv is None, expected one value")
    return float(emotion)


def describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else repr(value)
