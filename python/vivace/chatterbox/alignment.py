"""Where in the text the speech is, and when to hold back or force the stop token.

The decisions of Chatterbox 0.1.7's multilingual alignment analyzer (resemble-ai/chatterbox,
models/t3/inference/alignment_stream_analyzer.py) from a few rows of attention; host/alignment.cpp decides the same.
"""

import torch
from torch import Tensor

LIMIT = 2.0**15  # within the range of every half format


class AlignmentWatch:
    """One request's alignment. `text_length` counts start and stop.

    The analyzer's sums run over the frames since the text was first spoken through.
    """

    def __init__(self, text_length: int, stop_token: int):
        self.text_length, self.stop_token = text_length, stop_token
        self.step, self.position, self.frames = 0, 0, 0
        self.completed_at: int | None = None
        self.tail = torch.zeros(min(3, text_length))
        self.repeated = 0.0
        self.last_tokens: list[int] = []

    def __call__(self, logits: Tensor, rows: Tensor, last_token: int) -> Tensor:
        """Guided logits (1, vocab), edited where the decision asks for it.

        Args:
            rows: (frames, text_length) float32 on the CPU, attention to the text averaged over the heads: both
                start-of-speech positions in the first step, one position later.
        """
        s = self.text_length
        rows = rows.clone()
        rows[:, self.step + 1 :] = 0  # a frame cannot be further in the text than there have been steps
        position = int(rows[-1].argmax())
        if -4 < position - self.position < 7:
            self.position = position
        if self.completed_at is None:
            if self.position >= s - 3:
                self.completed_at = self.frames + len(rows)
        else:
            self.tail += rows[:, s - len(self.tail) :].sum(0)
            if s > 5:
                self.repeated += float(rows[:, : s - 5].max(dim=1).values.sum())
        self.frames += len(rows)
        self.step += 1

        self.last_tokens = [*self.last_tokens, last_token][-3:]
        token_repeats = len(self.last_tokens) == 3 and self.last_tokens[1] == self.last_tokens[2]
        tail_too_long = self.completed_at is not None and float(self.tail.max()) >= 5  # 200 ms
        if tail_too_long or self.repeated > 5 or token_repeats:
            logits = torch.full_like(logits, -LIMIT)
            logits[..., self.stop_token] = LIMIT
        elif position < s - 3 and s > 5:
            logits = logits.clone()
            logits[..., self.stop_token] = -LIMIT
        return logits
