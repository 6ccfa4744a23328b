"""A decode loop over an exported model in a page of Python: what the C++ host does, for tests to compare with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Options:
    seed: int = 0
    temperature: float = 0.8
    top_p: float = 1.0
    min_p: float = 0.05
    repetition_penalty: float = 1.2
    cfg_weight: float = 0.5
    exaggeration: float = 0.5
    max_new_tokens: int = 40


#: (logits (1, vocab), probes (heads, 1, probe_rows, capacity), tokens so far) -> logits (1, vocab)
Watch = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


@torch.inference_mode()
def generate(model, voice: dict, text_tokens: list[int], options: Options, watch: Watch | None = None) -> list[int]:
    """Speech tokens, the stop token included where it was drawn.

    Args:
        model: from vivace.t3.load().
        text_tokens: with the start and stop text tokens.
        watch: sees the guided logits and the alignment heads' attention of the conditional row; may change the logits.
    """
    speech = model.manifest["speech"]
    rows = 2 if options.cfg_weight > 0 else 1
    cond = model.encode_voice(voice["t3.speaker_emb"], voice["t3.cond_prompt_speech_tokens"], options.exaggeration)
    text = torch.tensor(text_tokens)
    prompt = torch.cat([model.embed_prompt(cond, text, row == 1) for row in range(rows)])
    length = prompt.size(0) // rows
    capacity = length + options.max_new_tokens
    k_cache, v_cache = model.new_cache(rows, capacity)
    cache_seqlens = torch.zeros(rows, dtype=torch.int32)
    cache_rows = torch.arange(rows, dtype=torch.int32)
    heads = len(model.manifest["alignment_heads"])
    probes = torch.empty(heads, rows, 2, capacity) if watch is not None else None

    starts = torch.arange(rows + 1, dtype=torch.int32) * length
    hidden = model(prompt, k_cache, v_cache, cache_seqlens, cache_rows, starts, length, probes)
    logits = model.logits(hidden[length - 1 :: length])
    cache_seqlens += length

    generator = torch.Generator().manual_seed(options.seed)
    seen = torch.zeros(1, speech["vocab_size"], dtype=torch.uint8)
    generated = [speech["start_token"]]
    for step in range(options.max_new_tokens):
        seen[0, generated[-1]] = 1
        pair = torch.tensor([[0, rows - 1 if rows == 2 else -1]], dtype=torch.int32)
        if watch is not None:  # between guidance and penalty: guide here, and tell the operator that there is one row
            if rows == 2:
                logits = logits[:1] + options.cfg_weight * (logits[:1] - logits[1:])
            logits = watch(logits, probes[:, :1], generated)
            pair[0, 1] = -1
        probs = torch.ops.vivace.sampling_probs(
            logits,
            pair,
            seen,
            *(
                torch.tensor([value])
                for value in (
                    options.cfg_weight,
                    options.temperature,
                    options.repetition_penalty,
                    options.min_p,
                    options.top_p,
                )
            ),
            torch.zeros(1, dtype=torch.int32),
        )
        token = torch.multinomial(probs, 1, generator=generator)[0]
        generated.append(int(token))
        if generated[-1] == speech["stop_token"] or step + 1 == options.max_new_tokens:
            break
        if watch is not None:
            probes = torch.empty(heads, rows, 1, capacity)
        logits = model.decode(
            token,
            torch.tensor([step + 1]),
            torch.zeros(rows, dtype=torch.int64),
            k_cache,
            v_cache,
            cache_seqlens,
            cache_rows,
            probes,
        )
        cache_seqlens += 1
    return generated[1:]
