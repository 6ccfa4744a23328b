"""A run of everything, with made-up figures whose places on the page are known."""

import pytest

FACTS = {"device": "cuda", "gpu": "NVIDIA <H200>", "driver": "580.1", "torch": "2.11.0", "date": "2026-11-22T08:00Z"}
FACTS |= {"matmul_tflops": 797.0, "read_gb_s": 4180.0, "commit": "abc1234"}


def generation(requests, rate, **fields):
    row = {"op": "generate", "implementation": "vivace", "model": "random", "requests": requests, "max_tokens": 1000}
    row |= {"tokens_per_s": rate, "rtf": rate / 25, "first_token_ms": 3.0, "ms_per_step": 0.4, "dtype": "bfloat16"}
    row |= {"weight_bytes": 1_063_352_320, "kv_bytes_per_token": 122_880, "prompt_tokens": 148}
    row |= {"vram_peak_gib": 1.7 + 0.27 * requests, "plan_gib": 1.75 + 0.27 * requests, "tokens": 1000 * requests}
    return row | {"cfg_weight": 0.5, "hash": "0123456789ab"} | FACTS | fields


def step(rows, tokens, ms, floor, peer):
    return {
        "op": "step",
        "rows": rows,
        "tokens": tokens,
        "arch": "sm90a",
        "dtype": "bf16",
        "ms": ms,
        "gbps": 3000.0,
        "floor_ms": floor,
        "floor_ratio": ms / floor,
        "ms_compile": peer,
        "ratio_compile": peer / ms,
        "peer": "compile",
        "peer_ms": peer,
        "ratio_best": peer / ms,
    } | FACTS


def forward(d, causal, s, rate):
    shape = {"op": "forward", "d": d, "causal": causal, "s": s, "s_k": s, "window": -1, "heads": 16, "heads_kv": 16}
    figures = {"us": 100.0, "tflops": rate, "us_cudnn": 110.0, "tflops_cudnn": rate / 1.1, "ratio_cudnn": 1.1}
    return shape | figures | {"batch": 16384 // s, "dtype": "bf16", "arch": "sm90a", "ratio_best": 1.1} | FACTS


def decode(rows, s, rate):
    shape = {"op": "decode", "d": 64, "hq": 16, "hkv": 16, "rows": rows, "s": s, "kv_mb": rows * s * 4096 / 1e6}
    return shape | {"us": 10.0, "gbps": rate, "us_cudnn": 11.0, "gbps_cudnn": rate / 1.1, "arch": "sm90a"} | FACTS


@pytest.fixture
def rows():
    found = [generation(1, 2500.0), generation(20, 25000.0), generation(64, 40000.0)]
    peer = generation(1, 60.0, implementation="Chatterbox eager", dtype="float32", max_tokens=200)
    found.append({name: value for name, value in peer.items() if name != "plan_gib"})
    found += [step(2, 300, 0.33, 0.24, 2.04), step(128, 300, 1.5, 1.25, 5.5)]
    found += [step(2, 1000, 0.36, 0.28, 2.1), step(128, 1000, 3.8, 3.6, 9.0)]
    for d in (64, 128):
        found += [forward(d, causal, s, 400.0 + s / 100) for causal in (False, True) for s in (512, 4096, 16384)]
    found += [decode(2, 512, 700.0), decode(128, 1024, 4400.0)]
    call = {"op": "overhead", "call": "vivace.attention", "from": "C++", "us": 5.0, "us_sdpa": 6.0, "ratio_sdpa": 1.2}
    return [*found, call | {"dtype": "bf16", "arch": "auto"} | FACTS]
