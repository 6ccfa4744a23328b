"""Attention against torch's SDPA backends on one GPU: forward in TFLOP/s, decode in microseconds and GB/s of KV.

    PYTHONPATH=python python3 tests/bench/attention.py [forward] [decode] [--json FILE]

Forward: bf16, 16,384 tokens in all, hidden 2048, median of event-timed calls, 4 * b * h * s * s * d operations (half of
it when causal). Decode: one query row, contiguous KV, a CUDA graph of 20 calls; a KV set under about 50 MB stays in L2
between them. The ratio is to cuDNN in the same run: compare ratios, not absolute figures, between machines.
"""

import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vivace.ops  # noqa: F401

OPS = torch.ops.vivace
TOKENS, HIDDEN = 16384, 2048
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def event_ms(function, repeats=15, warmup=4):
    """Median time of a call in ms."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_us(function, calls=20, replays=7):
    """Median time of a call in microseconds, inside a CUDA graph of ``calls`` of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return event_ms(graph.replay, repeats=replays, warmup=2) / calls * 1e3


def attempt(measure, function):
    """The measurement, or None where a backend does not take the call."""
    try:
        return measure(function)
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"  not measured: {str(error).splitlines()[0][:150]}")
        return None


def sdpa(backend, q, k, v, **options):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options)

    return call


def row(values, widths):
    print(
        " ".join(
            ("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)).rjust(w)
            for v, w in zip(values, widths, strict=True)
        )
    )


def forward():
    results = []
    names = ("vivace", "sm80", *BACKENDS)
    widths = (4, 6, 6, *(8,) * len(names), 9)
    row(("d", "mask", "s", *names, "vs cudnn"), widths)
    for dim in (64, 128):
        for causal in (False, True):
            for seqlen in (512, 1024, 2048, 4096, 8192):
                batch, heads = TOKENS // seqlen, HIDDEN // dim
                q, k, v = (
                    torch.randn(batch, seqlen, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
                )
                flop = 4.0 * batch * heads * seqlen * seqlen * dim * (0.5 if causal else 1.0)

                def ours(q=q, k=k, v=v, causal=causal):
                    return OPS.attention(q, k, v, causal=causal)

                ms = {"vivace": attempt(event_ms, ours)}
                previous = OPS.force_arch(80)
                ms["sm80"] = attempt(event_ms, ours)
                OPS.force_arch(previous)
                for name, backend in BACKENDS.items():
                    ms[name] = attempt(event_ms, sdpa(backend, q, k, v, is_causal=causal))
                tflops = {name: round(flop / t / 1e9, 1) if t else None for name, t in ms.items()}
                ratio = tflops["vivace"] / tflops["cudnn"] if tflops["vivace"] and tflops["cudnn"] else None
                results.append({"d": dim, "causal": causal, "s": seqlen, "ms": ms, "tflops": tflops, "ratio": ratio})
                mask = "causal" if causal else "full"
                row((dim, mask, seqlen, *(f"{x:.0f}" if x else None for x in tflops.values()), ratio), widths)
    return results


def decode():
    results = []
    names = ("vivace", *BACKENDS)
    widths = (4, 3, 3, 5, 5, 8, *(14,) * len(names), 9)
    row(("d", "h", "hkv", "rows", "kv", "MB", *(f"{n} us(GB/s)" for n in names), "vs cudnn"), widths)
    for dim, heads, heads_kv in ((64, 16, 16), (128, 32, 8)):
        for rows in (2, 16, 40, 128):
            for length in (512, 1024, 4096):
                q = torch.randn(rows, 1, heads, dim, device="cuda", dtype=torch.bfloat16)
                k, v = (torch.randn(rows, length, heads_kv, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
                lengths = torch.full((rows,), length, dtype=torch.int32, device="cuda")
                kv_bytes = 2 * k.numel() * k.element_size()

                def ours(q=q, k=k, v=v, lengths=lengths):
                    return OPS.attention_with_kvcache(q, k, v, cache_seqlens=lengths)

                us = {"vivace": attempt(graph_us, ours)}
                for name, backend in BACKENDS.items():
                    us[name] = attempt(graph_us, sdpa(backend, q, k, v, enable_gqa=heads != heads_kv))
                rate = {name: kv_bytes / t / 1e3 if t else None for name, t in us.items()}
                ratio = us["cudnn"] / us["vivace"] if us["vivace"] and us["cudnn"] else None
                results.append(
                    {
                        "d": dim,
                        "heads": heads,
                        "heads_kv": heads_kv,
                        "rows": rows,
                        "kv": length,
                        "us": us,
                        "gb_s": rate,
                        "ratio": ratio,
                    }
                )
                cells = (f"{us[n]:.1f} ({rate[n]:.0f})" if us[n] else None for n in names)
                row((dim, heads, heads_kv, rows, length, f"{kv_bytes / 1e6:.1f}", *cells, ratio), widths)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["forward", "decode"])
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, function in (("forward", forward), ("decode", decode)):
        if name in arguments.what:
            results[name] = function()
            if arguments.json:  # after each, so that a run that is cut short leaves what it has
                with open(arguments.json, "w", encoding="utf-8") as file:
                    json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
