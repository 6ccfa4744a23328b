"""Chatterbox's own T3 module on transformers' attention: where vivace's operators cannot be used."""

from typing import Any

import torch
from torch import Tensor, nn

from vivace.chatterbox.request import Request
from vivace.patches import Patches
from vivace.t3.config import ALIGNMENT_HEADS


class LlamaRows:
    """Rows (loop.Rows) over T3's LlamaModel; embeddings and head are T3's too.

    The alignment heads' probabilities are computed beside the attention, from the queries' hidden states and the cached
    keys: no implementation but eager returns them.
    """

    def __init__(self, t3: nn.Module, request: Request, aligned: bool):
        self.t3, self.request = t3, request
        self.rows = 2 if request.guided else 1
        self.dtype = next(t3.tfmr.parameters()).dtype
        self.cache: Any = None
        self.seen: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.hooks = []
        if aligned:
            for layer, _ in ALIGNMENT_HEADS:
                attention = t3.tfmr.layers[layer].self_attn
                self.hooks.append(attention.register_forward_pre_hook(self._remember(layer), with_kwargs=True))

    def prefill(self) -> Tensor:
        t3, request = self.t3, self.request
        cond = t3.prepare_conditioning(request.t3_cond)  # (1, cond_length, hidden)
        self.cond_length = cond.size(1)
        text = torch.tensor([request.text_tokens], device=t3.device)
        positions = t3.text_pos_emb(text)
        bos = t3.speech_emb(torch.full((1, 1), t3.hp.start_speech_token, device=t3.device))
        bos = (bos + t3.speech_pos_emb.get_fixed_embedding(0)).expand(1, 2, -1)
        texts = [t3.text_emb(text) + positions]
        if self.rows == 2:
            texts.append(torch.zeros_like(texts[0]) + positions)
        embeds = torch.cat([torch.cat([cond, embedded, bos], dim=1) for embedded in texts])
        return self._forward(embeds)

    def decode(self, token: Tensor, position: int) -> Tensor:
        embed = self.t3.speech_emb(token) + self.t3.speech_pos_emb.get_fixed_embedding(position)
        return self._forward(embed.expand(self.rows, -1, -1))

    def frames(self) -> Tensor:
        return torch.stack([self._attention(layer, head) for layer, head in ALIGNMENT_HEADS]).mean(0).cpu()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.cache, self.seen = None, {}

    def _forward(self, embeds: Tensor) -> Tensor:
        if self.cache is None:
            from transformers import DynamicCache

            self.cache = DynamicCache()
        output = self.t3.tfmr(
            inputs_embeds=embeds.to(self.dtype),
            past_key_values=self.cache,
            use_cache=True,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        head = self.t3.speech_head
        return head(output.last_hidden_state[:, -1].to(head.weight.dtype)).float()

    def _remember(self, layer: int):
        def hook(_module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            # Of the prompt the two start-of-speech positions.
            self.seen[layer] = (hidden[:1, -2:], kwargs["position_embeddings"])

        return hook

    def _attention(self, layer: int, head: int) -> Tensor:
        """(frames, text tokens) probabilities of one head for the guided row."""
        attention = self.t3.tfmr.layers[layer].self_attn
        size = attention.head_dim
        hidden, (cos, sin) = self.seen[layer]
        q = hidden[0] @ attention.q_proj.weight[head * size : (head + 1) * size].T  # (frames, head_dim)
        cos, sin = cos[0, -q.size(0) :], sin[0, -q.size(0) :]
        half = size // 2
        q = q * cos + torch.cat([-q[:, half:], q[:, :half]], dim=-1) * sin
        keys = self.cache.layers[layer].keys if hasattr(self.cache, "layers") else self.cache.key_cache[layer]
        groups = (attention.q_proj.weight.size(0) // size) // keys.size(1)
        k = keys[0, head // groups]  # (keys, head_dim)
        scores = (q @ k.T).float() * size**-0.5
        frames, length = scores.shape
        after = torch.ones(frames, length, dtype=torch.bool, device=scores.device).triu(length - frames + 1)
        probs = scores.masked_fill(after, -torch.inf).softmax(-1)
        return probs[:, self.cond_length : self.cond_length + len(self.request.text_tokens)]


def set_attention(t3: nn.Module, name: str, patches: Patches) -> None:
    """Makes T3's LlamaModel run the implementation `name` ("sdpa" or "eager")."""
    from transformers.models.llama import modeling_llama

    config = t3.tfmr.config
    before = config._attn_implementation
    patches.on_undo("_attn_implementation", lambda: setattr(config, "_attn_implementation", before))
    config._attn_implementation = name
    # Up to transformers 4.47 each implementation is a class of its own with the same parameters.
    classes = getattr(modeling_llama, "LLAMA_ATTENTION_CLASSES", None)
    for layer in t3.tfmr.layers if classes else ():
        attention, kind = layer.self_attn, type(layer.self_attn)
        patches.on_undo("self_attn", lambda attention=attention, kind=kind: setattr(attention, "__class__", kind))
        attention.__class__ = classes[name]
