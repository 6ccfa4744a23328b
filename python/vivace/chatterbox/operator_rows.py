"""vivace's T3 module on the operators, driven from Python: where the C++ engine does not load."""

import torch
from torch import Tensor

from vivace.chatterbox.request import Request, exaggeration_of, prompt_of, speaker_of
from vivace.t3 import T3, T3Config


class OperatorRows:
    """Rows (loop.Rows) over vivace.t3.T3 with its own KV cache."""

    def __init__(self, model: T3, config: T3Config, request: Request, aligned: bool):
        self.model, self.config, self.request, self.aligned = model, config, request, aligned
        self.device = model.speech_emb.weight.device
        self.rows = 2 if request.guided else 1
        self.probes: Tensor | None = None

    def prefill(self) -> Tensor:
        model, request = self.model, self.request
        cond = model.encode_voice(
            speaker_of(request.t3_cond, self.config.speaker_embed_size).to(self.device),
            prompt_of(request.t3_cond).to(self.device),
            exaggeration_of(request.t3_cond),
        )
        text = torch.tensor(request.text_tokens, device=self.device)
        prompt = torch.cat([model.embed_prompt(cond, text, row == 1) for row in range(self.rows)])
        length = prompt.size(0) // self.rows
        self.k_cache, self.v_cache = model.new_cache(self.rows, length + request.max_new_tokens)
        self.lengths = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        self.cache_rows = torch.arange(self.rows, dtype=torch.int32, device=self.device)
        self.row_request = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        starts = torch.arange(self.rows + 1, dtype=torch.int32, device=self.device) * length
        hidden = model(
            prompt, self.k_cache, self.v_cache, self.lengths, self.cache_rows, starts, length, self._new_probes(2)
        )
        self.lengths += length
        return model.logits(hidden[length - 1 :: length])

    def decode(self, token: Tensor, position: int) -> Tensor:
        logits = self.model.decode(
            token.view(1),
            torch.tensor([position], device=self.device),
            self.row_request,
            self.k_cache,
            self.v_cache,
            self.lengths,
            self.cache_rows,
            self._new_probes(1),
        )
        self.lengths += 1
        return logits

    def frames(self) -> Tensor:
        first = self.config.cond_length
        rows = self.probes[:, 0].mean(0)  # (frames, capacity)
        return rows[:, first : first + len(self.request.text_tokens)].cpu()

    def close(self) -> None:
        self.k_cache = self.v_cache = self.probes = None

    def _new_probes(self, frames: int) -> Tensor | None:
        if self.aligned:
            heads, capacity = len(self.config.alignment_heads), self.k_cache.size(2)
            self.probes = torch.empty(heads, self.rows, frames, capacity, device=self.device)
        return self.probes
