#!/usr/bin/env python3
"""GPU round, step "chatterbox": Chatterbox's own T3 with random weights, as it is and after vivace.accelerate().

Needs chatterbox-tts (its T3 is enough) and transformers; says so and ends with 0 where they are missing. Prints for
both: milliseconds a token, memory, and how far the tokens agree, in float32 (greedy: identical, or the step fails) and
in bfloat16.

    python3 .ci/gpu_chatterbox.py [--tokens 300] [--peer-tokens 100] [--json FILE]
"""

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=300, help="of vivace's runs (default 300)")
    parser.add_argument("--peer-tokens", type=int, default=100, help="of Chatterbox's own runs (default 100)")
    parser.add_argument("--agreement-tokens", type=int, default=150, help="compared token by token (default 150)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", default="fp32,bf16", help="of accelerate() (default fp32,bf16)")
    parser.add_argument("--batch", default="1,8,16", help="requests at once in bfloat16 (default 1,8,16; 0: none)")
    parser.add_argument("--no-half", action="store_true", help="leave out Chatterbox's own loop cast to bfloat16")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    for name in ("torch", "transformers", "chatterbox"):
        if importlib.util.find_spec(name) is None:
            print(f"chatterbox step: {name} is not installed: skipped")
            return 0
    import torch

    if not torch.cuda.is_available():
        print("chatterbox step: no CUDA device: skipped")
        return 0
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("vivace").setLevel(logging.INFO)
    step = Step(arguments)
    try:
        step.run()
    finally:  # what there is, whatever ended it
        step.report()
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(step.result(), file, indent=1)
    return 0 if step.result()["ok"] else 1


class Step:
    def __init__(self, arguments):
        self.arguments = arguments
        self.rows: list[dict] = []
        self.checks: list[tuple[str, bool, str]] = []
        self.done = False

    def run(self) -> None:

        began = time.monotonic()
        t3 = build_t3()
        self.say(f"T3 of {sum(p.numel() for p in t3.parameters()) / 1e6:.1f} M random parameters", began)
        stock = state_of(t3)
        args = self.arguments

        # As it is: transformers' sdpa in float32.
        reference = greedy(t3, args.agreement_tokens)
        self.measure(t3, "Chatterbox as it is", "float32", args.peer_tokens)
        self.say("Chatterbox's own loop", began)

        for dtype in args.dtypes.split(","):
            self.accelerated(t3, dtype, reference)
            self.say(f"accelerate(dtype={dtype})", began)
            self.check(f"restore after {dtype}", state_of(t3) == stock, "every attribute, shape, device and value")
        counts = [int(count) for count in args.batch.split(",") if int(count)]
        if counts:
            self.batch(t3, counts)
            self.say("batch", began)
        # The same tokens after all: the weights are back.
        again = greedy(t3, 20)
        self.check("Chatterbox after restore", again == reference[:20], "the same greedy tokens as before accelerate()")
        if not args.no_half:
            self.half(t3, reference)
            self.say("Chatterbox in bfloat16", began)
        self.done = True

    def result(self) -> dict:
        import torch

        return {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "rows": self.rows,
            "checks": [{"check": name, "ok": ok, "detail": detail} for name, ok, detail in self.checks],
            "ok": self.done and all(ok for _, ok, _ in self.checks),
        }

    def accelerated(self, t3, dtype: str, reference: list[int]) -> None:
        import torch

        from vivace.chatterbox import accelerate, describe, restore

        torch.cuda.empty_cache()
        began = time.monotonic()
        accelerate(t3, dtype=dtype)
        seconds = time.monotonic() - began
        try:
            found = describe(t3)
            name = f"accelerate(), {found['loop']}"
            tokens = greedy(t3, len(reference))
            agreed = common(tokens, reference)
            detail = f"{agreed} of {len(reference)} greedy tokens as Chatterbox's float32"
            if dtype == "fp32":
                self.check("float32, greedy", tokens == reference, detail)
            row = self.measure(t3, name, found["dtype"], self.arguments.tokens)
            row |= {"accelerate_seconds": round(seconds, 2), "greedy_agreement": agreed, "compared": len(reference)}
            if found["engine"]:
                stats = describe(t3)["engine"]
                row["graph_replays"], row["eager_steps"] = stats["graph_replays"], stats["eager_steps"]
        finally:
            restore(t3)
        if dtype == "fp32":
            self.sampled(t3)
        else:
            row |= {"likeliest_agreement": next_tokens(operator_rows(t3, torch.bfloat16, reference), t3, reference)}

    def sampled(self, t3) -> None:
        """Sampled tokens with torch's generator: Chatterbox's, up to a draw that rounding decides."""
        from vivace.chatterbox import accelerate, restore

        expected = generate(t3, 60, seed=11)
        accelerate(t3, dtype="fp32", rng="torch")
        found = generate(t3, 60, seed=11)
        restore(t3)
        agreed = common(found, expected)
        self.check("float32, sampled with rng=torch", found == expected, f"{agreed} of {len(expected)} tokens")

    def batch(self, t3, counts: list[int]) -> None:
        """Several requests at once through the session, as generate_batch submits them."""
        import torch

        from vivace.chatterbox import accelerate, describe, restore
        from vivace.chatterbox.session import session_of

        accelerate(t3, max_requests=max(counts))
        try:
            session = session_of(t3)
            for count in counts:
                requests = [
                    session.request({**arguments(t3), "max_new_tokens": 200, "stop_on_eos": True}).with_seed(i, i)
                    for i in range(count)
                ]
                session.generate(requests)
                torch.cuda.synchronize()
                began = time.monotonic()
                outcomes = session.generate(requests)
                seconds = time.monotonic() - began
                tokens = sum(len(outcome.tokens) for outcome in outcomes)
                self.rows.append(
                    {
                        "what": f"accelerate(), {count} at once",
                        "dtype": describe(t3)["dtype"],
                        "ms_per_token": round(1e3 * seconds / max(len(o.tokens) for o in outcomes), 3),
                        "tokens_per_second": round(tokens / seconds, 1),
                        "memory_gib": memory(),
                    }
                )
        finally:
            restore(t3)

    def half(self, t3, reference: list[int]) -> None:
        """Chatterbox's own loop with its weights cast: what bfloat16 alone gives."""
        import torch

        t3.to(torch.bfloat16)
        try:
            tokens = greedy(t3, min(60, len(reference)))
        except RuntimeError as error:  # dtypes meet in its conditioning
            print(f"Chatterbox cast to bfloat16 fails: {str(error).splitlines()[0]}")
            return
        row = self.measure(t3, "Chatterbox, cast to bfloat16", "bfloat16", self.arguments.peer_tokens)
        row |= {
            "greedy_agreement": common(tokens, reference),
            "compared": len(tokens),
            "likeliest_agreement": next_tokens(llama_rows(t3, reference), t3, reference),
        }

    def measure(self, t3, what: str, dtype: str, tokens: int) -> dict:
        """Median milliseconds a token, and the most memory that torch held."""
        import torch

        generate(t3, 12, seed=0)  # warm
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times, counts = [], []
        for run in range(self.arguments.runs):
            began = time.monotonic()
            out = generate(t3, tokens, seed=run)
            torch.cuda.synchronize()
            times.append(time.monotonic() - began)
            counts.append(len(out))
        each = [1e3 * seconds / count for seconds, count in zip(times, counts, strict=True)]
        row = {
            "what": what,
            "dtype": dtype,
            "ms_per_token": round(statistics.median(each), 3),
            "tokens_per_second": round(1e3 / statistics.median(each), 1),
            "tokens": counts,
            "memory_gib": memory(),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        self.rows.append(row)
        print(f"{what}, {dtype}: {row['ms_per_token']} ms a token, {row['memory_gib']} GiB", flush=True)
        return row

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.checks.append((name, ok, detail))
        print(f"{'ok' if ok else 'FAILED'}: {name}: {detail}", flush=True)

    @staticmethod
    def say(what: str, began: float) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {what}", flush=True)

    def report(self) -> None:
        print("\n| T3 | dtype | ms a token | tokens/s | memory GiB | same as fp32 until | same next token |")
        print("|:---|:------|-----------:|---------:|-----------:|-------------------:|----------------:|")
        for row in self.rows:
            agreed = f"{row['greedy_agreement']} of {row['compared']}" if "compared" in row else ""
            print(
                f"| {row['what']} | {row['dtype']} | {row['ms_per_token']:.3f} | {row['tokens_per_second']:.0f} | "
                f"{row['memory_gib']} | {agreed} | {row.get('likeliest_agreement', '')} |"
            )


def build_t3():
    """Chatterbox's English T3 with its constructor's weights, the attention's larger so that tokens depend on it."""
    import torch
    from chatterbox.models.t3 import t3 as chatterbox

    chatterbox.tqdm = lambda steps, **_: steps  # no progress bar
    torch.manual_seed(0)
    with torch.device("cuda"):
        t3 = chatterbox.T3(chatterbox.T3Config.english_only())
    t3 = t3.to("cuda").eval()
    with torch.no_grad():
        for name, parameter in t3.named_parameters():
            if name.startswith("tfmr.layers") and "norm" not in name:
                parameter.mul_(2.0)
        t3.speech_head.weight.mul_(4.0)
        t3.speech_head.weight[t3.hp.stop_speech_token] = 0  # random weights would stop anywhere
    return t3


def arguments(t3) -> dict:
    import torch
    from chatterbox.models.t3.modules.cond_enc import T3Cond

    generator = torch.Generator().manual_seed(1)
    cond = T3Cond(
        speaker_emb=torch.nn.functional.normalize(torch.rand(1, 256, generator=generator)),
        cond_prompt_speech_tokens=torch.randint(6561, (1, 150), generator=generator),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    ).to(device="cuda", dtype=t3.speech_head.weight.dtype)
    words = torch.randint(1, 255, (100,), generator=generator).tolist()
    text = torch.tensor([[255, *words, 0]] * 2, device="cuda")
    return {"t3_cond": cond, "text_tokens": text, "cfg_weight": 0.5, "top_p": 1.0, "min_p": 0.05, "temperature": 0.8}


def generate(t3, tokens: int, seed: int, **options) -> list[int]:
    import torch

    torch.manual_seed(seed)
    return t3.inference(**{**arguments(t3), "max_new_tokens": tokens, **options})[0].tolist()


def greedy(t3, tokens: int) -> list[int]:
    # Chatterbox divides by the temperature: a tiny one is greedy.
    return generate(t3, tokens, seed=0, temperature=1e-5)


def greedy_request(t3, count: int):
    from vivace.chatterbox.request import request_of

    return request_of({**arguments(t3), "max_new_tokens": count, "temperature": 0.0, "repetition_penalty": 1.2}, t3)


def operator_rows(t3, dtype, reference: list[int]):
    """vivace's module on its operators."""
    from vivace.chatterbox.operator_rows import OperatorRows
    from vivace.chatterbox.source import ModuleWeights, config_of
    from vivace.t3 import load_model

    weights = ModuleWeights(t3)
    config = config_of(t3, weights)
    return OperatorRows(
        load_model(weights, config, dtype).to("cuda"), config, greedy_request(t3, len(reference)), False
    )


def llama_rows(t3, reference: list[int]):
    """Chatterbox's module."""
    from vivace.chatterbox.llama_rows import LlamaRows

    return LlamaRows(t3, greedy_request(t3, len(reference)), False)


def next_tokens(rows, t3, reference: list[int]) -> str:
    """For how many of the reference's tokens the likeliest one is the same after the same tokens before."""
    import torch

    from vivace.chatterbox.sampling import sample

    request, hits = rows.request, 0
    with torch.inference_mode():
        seen = torch.tensor([[t3.hp.start_speech_token]], device="cuda")
        logits = rows.prefill()
        for step, token in enumerate(reference):
            guided = logits[:1] + request.cfg_weight * (logits[:1] - logits[1:])
            hits += int(sample(guided, seen, request, None)) == token
            forced = torch.tensor([[token]], device="cuda")
            seen = torch.cat([seen, forced], dim=1)
            if step + 1 < len(reference):
                logits = rows.decode(forced, step + 1)
    rows.close()
    return f"{hits} of {len(reference)}"


def common(a: list[int], b: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def memory() -> float:
    import torch

    return round(torch.cuda.memory_allocated() / 2**30, 2)


def state_of(t3) -> dict:
    """What restore() must bring back: attributes by identity, tensors by place and value."""
    return {
        "attributes": {
            name: id(value) for name, value in vars(t3).items() if name not in ("patched_model", "compiled")
        },
        "config": dict(vars(t3.cfg)),
        "parameters": {
            name: (id(p), str(p.device), p.dtype, tuple(p.shape), float(p.double().sum()))
            for name, p in (*t3.named_parameters(), *t3.named_buffers())
            if not name.startswith("patched_model")
        },
    }


if __name__ == "__main__":
    sys.exit(main())
