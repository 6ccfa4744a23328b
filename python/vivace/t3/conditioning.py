"""What T3 knows of a voice: speaker, prompt and emotion, as embeddings before the text."""

import torch
from torch import Tensor, nn

from vivace.t3.config import T3Config
from vivace.t3.perceiver import Perceiver


class ConditioningEncoder(nn.Module):
    """[speaker | resampled prompt | emotion]: (1 + perceiver_queries + 1, hidden). Depends on the voice alone."""

    def __init__(self, config: T3Config):
        super().__init__()
        self.speaker = nn.Linear(config.speaker_embed_size, config.hidden_size)
        self.perceiver = Perceiver(config.hidden_size, config.perceiver_queries, config.perceiver_heads)
        self.emotion = nn.Linear(1, config.hidden_size, bias=False)

    def forward(self, speaker_emb: Tensor, prompt_emb: Tensor, emotion: float) -> Tensor:
        """speaker_emb (1, speaker_embed_size), prompt_emb (tokens, hidden) -> (cond_length, hidden)."""
        weight = self.emotion.weight
        speaker = self.speaker(speaker_emb.to(weight.dtype))
        prompt = self.perceiver(prompt_emb)
        strength = self.emotion(torch.full([1, 1], emotion, dtype=weight.dtype, device=weight.device))
        return torch.cat([speaker, prompt, strength])
