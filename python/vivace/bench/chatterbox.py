"""Chatterbox's own T3 in a process of its own: `python -m vivace.bench.chatterbox` does its imports, prints a line,
reads a job (JSON) from stdin and prints one object.

Forms: "eager" and "sdpa" are its `inference` in fp32 as it is installed, with that attention; "compiled" is the same
model in bf16 under torch.compile (reduce-overhead) with a static cache, sampled by the same processors in the same
order: what those who made it faster do.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import sys
import time
import types

import torch

from vivace.t3.config import T3Config, preset

PROMPT = 150  # speech tokens of the voice


def available() -> str | None:
    """Why Chatterbox's T3 cannot be had, or None."""
    for package in ("chatterbox", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{'chatterbox-tts' if package == 'chatterbox' else package} is not installed"
    return None


def import_t3():
    """chatterbox.models.t3.t3, without the package's __init__, which wants all that speech needs besides."""
    if "chatterbox" not in sys.modules:
        package = types.ModuleType("chatterbox")
        package.__path__ = list(importlib.util.find_spec("chatterbox").submodule_search_locations)
        sys.modules["chatterbox"] = package
    return importlib.import_module("chatterbox.models.t3.t3")


@contextlib.contextmanager
def sized(module, config: T3Config):
    """Its constructors take their sizes from constants: those of ``config`` meanwhile."""
    perceiver = importlib.import_module("chatterbox.models.t3.modules.perceiver").Perceiver.__init__
    llama, defaults = module.LLAMA_CONFIGS["Llama_520M"], perceiver.__defaults__
    saved = dict(llama)
    llama.update(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    hidden = config.hidden_size
    perceiver.__defaults__ = (config.perceiver_queries, hidden, hidden, config.perceiver_heads)
    try:
        yield
    finally:
        llama.update(saved)
        perceiver.__defaults__ = defaults


def build(config: T3Config, form: str, device: str, seed: int):
    """(module, T3 on the device, in evaluation mode). It never draws its stop token: lengths are the job's."""
    module = import_t3()
    module.tqdm = lambda steps, **_: steps
    hp = importlib.import_module("chatterbox.models.t3.modules.t3_config").T3Config
    torch.manual_seed(seed)
    with sized(module, config), torch.device(device):
        t3 = module.T3(hp(text_tokens_dict_size=config.text_vocab_size))
    t3 = t3.to(device).eval()
    if form == "compiled":
        t3 = t3.to(torch.bfloat16)
    else:
        t3.tfmr.set_attn_implementation(form)
    t3.hp.stop_speech_token = -1
    return module, t3


def condition(t3, seed: int):
    module = importlib.import_module("chatterbox.models.t3.modules.cond_enc")
    generator = torch.Generator().manual_seed(seed)
    device, dtype = t3.device, t3.speech_head.weight.dtype
    speaker = torch.randn(1, t3.hp.speaker_embed_size, generator=generator).to(device, dtype)
    prompt = torch.randint(6561, (1, PROMPT), generator=generator).to(device)
    return module.T3Cond(
        speaker_emb=speaker,
        cond_prompt_speech_tokens=prompt,
        emotion_adv=torch.full((1, 1, 1), 0.5, device=device, dtype=dtype),
    )


def text(t3, count: int, seed: int) -> torch.Tensor:
    """(2, count + 2): the same text for the conditional and the unconditional row."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 255, (count,), generator=generator)
    ends = torch.tensor([t3.hp.start_text_token]), torch.tensor([t3.hp.stop_text_token])
    return torch.cat([ends[0], words, ends[1]]).to(t3.device).expand(2, -1)


def upstream(t3, tokens: int, job: dict) -> dict:
    """One call of T3.inference."""
    stamps = []
    hook = t3.speech_emb.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
    wait(t3)
    start = time.perf_counter()
    out = t3.inference(
        t3_cond=condition(t3, job["seed"]),
        text_tokens=text(t3, job["text_tokens"], job["seed"]),
        max_new_tokens=tokens,
        cfg_weight=job["cfg_weight"],
    )
    wait(t3)
    seconds = time.perf_counter() - start
    hook.remove()
    drawn = out.size(1)
    # Each drawn token is embedded once the host has seen it.
    return {"seconds": seconds, "tokens": drawn, "first_token_seconds": stamps[-drawn] - start}


class Compiled:
    """The loop of T3.inference over a compiled step with a static cache."""

    def __init__(self, module, t3, job: dict):
        self.module, self.t3, self.job = module, t3, job
        self.parameters = inspect.signature(type(t3.tfmr).forward).parameters
        capacity = -(-(34 + job["text_tokens"] + 8 + max(job["max_tokens"], job["warmup"])) // 128) * 128
        from transformers import StaticCache

        self.cache = StaticCache(config=t3.tfmr.config, max_cache_len=capacity)
        self.step = torch.compile(self.forward, mode="reduce-overhead", dynamic=False)

    def forward(self, x, position):
        extra = {"cache_position": position} if "cache_position" in self.parameters else {}
        hidden = self.t3.tfmr(
            inputs_embeds=x, past_key_values=self.cache, position_ids=position.unsqueeze(0), use_cache=True, **extra
        ).last_hidden_state
        return self.t3.speech_head(hidden[:, -1]).float()

    def __call__(self, tokens: int) -> dict:
        t3, module, job = self.t3, self.module, self.job
        wait(t3)
        start = time.perf_counter()
        self.cache.reset()
        bos = torch.full((1, 1), t3.hp.start_speech_token, device=t3.device)
        prompt, _ = t3.prepare_input_embeds(
            t3_cond=condition(t3, job["seed"]),
            text_tokens=text(t3, job["text_tokens"], job["seed"]),
            speech_tokens=bos.expand(2, 1),
            cfg_weight=job["cfg_weight"],
        )
        first = t3.speech_emb(bos) + t3.speech_pos_emb.get_fixed_embedding(0)
        prompt = torch.cat([prompt, first.expand(2, -1, -1)], dim=1)
        position = torch.arange(prompt.size(1), device=t3.device)
        logits = self.forward(prompt, position)
        position = position[-1:] + 1
        seen, stamps = bos, []
        penalty = module.RepetitionPenaltyLogitsProcessor(penalty=1.2)
        min_p, top_p = module.MinPLogitsWarper(min_p=0.05), module.TopPLogitsWarper(top_p=0.95)
        for i in range(tokens):
            values = logits[:1] + job["cfg_weight"] * (logits[:1] - logits[1:])
            values = top_p(seen, min_p(seen, penalty(seen, values) / 0.8))
            token = torch.multinomial(torch.softmax(values, dim=-1), 1)
            seen = torch.cat([seen, token], dim=1)
            if token.view(-1) == t3.hp.stop_speech_token:  # the host waits here in every step, as upstream does
                break
            if not stamps:
                stamps.append(time.perf_counter())
            x = t3.speech_emb(token) + t3.speech_pos_emb.get_fixed_embedding(i + 1)
            torch.compiler.cudagraph_mark_step_begin()
            logits = self.step(x.expand(2, -1, -1).contiguous(), position).clone()
            position = position + 1
        wait(t3)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": seen.size(1) - 1, "first_token_seconds": stamps[0] - start}


def wait(t3) -> None:
    if t3.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def measure(job: dict) -> dict:
    """The object that the process prints: runs, dtype, prompt_tokens, warmup_seconds, allocator_peak_gib."""
    config = preset(job["shape"])
    module, t3 = build(config, job["form"], job["device"], job["seed"])
    call = Compiled(module, t3, job) if job["form"] == "compiled" else lambda tokens: upstream(t3, tokens, job)
    start = time.perf_counter()
    for _ in range(2 if job["form"] == "compiled" else 1):  # a CUDA graph is recorded at the second
        call(max(job["warmup"], 2))
    found = {"warmup_seconds": round(time.perf_counter() - start, 2)}
    found["runs"] = [call(job["max_tokens"]) for _ in range(job["repeat"])]
    found["dtype"] = str(t3.speech_head.weight.dtype).removeprefix("torch.")
    found["prompt_tokens"] = 34 + job["text_tokens"] + 2 + 2
    if job["device"] == "cuda":
        found["allocator_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return found


if __name__ == "__main__":
    import_t3()
    print("ready", flush=True)
    print(json.dumps(measure(json.load(sys.stdin))))
