"""The decode loop in Python, over anything that turns a token into logits."""

from typing import Protocol

import torch
from torch import Tensor

from vivace.chatterbox.alignment import AlignmentWatch
from vivace.chatterbox.request import Outcome, Request
from vivace.chatterbox.sampling import sample


class Rows(Protocol):
    """The model's rows of one request: one, or with guidance two. Made for a request and closed after it."""

    def prefill(self) -> Tensor:
        """Logits (rows, vocab) float32 after the prompt."""

    def decode(self, token: Tensor, position: int) -> Tensor:
        """Logits after one more token (1, 1) at its speech position."""

    def frames(self) -> Tensor:
        """(frames, text tokens) float32 on the CPU: the alignment heads' mean attention in the last forward."""

    def close(self) -> None: ...


@torch.inference_mode()
def run(rows: Rows, request: Request, hp, device: torch.device, aligned: bool) -> Outcome:
    """Generates one request as T3.inference does."""
    generator = None if request.seed is None else torch.Generator(device).manual_seed(request.seed)
    watch = AlignmentWatch(len(request.text_tokens), hp.stop_speech_token) if aligned else None
    seen = torch.tensor([[hp.start_speech_token]], device=device)
    tokens: list[int] = []
    last = hp.start_speech_token
    try:
        logits = rows.prefill()
        for step in range(request.max_new_tokens):
            guided = logits[:1]
            if request.guided:
                weight = torch.as_tensor(request.cfg_weight, device=logits.device, dtype=logits.dtype)
                guided = guided + weight * (guided - logits[1:])
            if watch is not None:
                guided = watch(guided, rows.frames(), last)
            token = sample(guided, seen, request, generator)
            last = int(token)
            if last == hp.stop_speech_token and request.stop_on_eos:
                return Outcome(tokens, "stop")
            tokens.append(last)
            seen = torch.cat([seen, token], dim=1)
            if request.progress is not None:
                request.progress(len(tokens))
            if request.on_tokens is not None:
                go_on = request.on_tokens(request.index, [last], len(tokens), request.max_new_tokens)
                if go_on is not None and not go_on:
                    return Outcome(tokens, "cancelled")
            if step + 1 < request.max_new_tokens:
                logits = rows.decode(token, step + 1)
        return Outcome(tokens, "length")
    finally:
        rows.close()
