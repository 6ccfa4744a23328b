"""Every operator once, against torch's own arithmetic. Run as a program, so that a crash is an answer too.

python -m vivace.doctor.selftest      prints a JSON object on its last line
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from vivace.doctor.attempt import first_line

_SECONDS = 10.0


def main() -> int:
    from vivace import library

    began = time.monotonic()
    library.load()
    import torch

    from vivace import ops

    info = ops.build_info()
    devices = ["cpu"]
    if torch.cuda.is_available() and info.get("cuda"):
        devices.append("cuda")
    results = []
    for device in devices:
        dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
        for dtype in dtypes:
            for name, test in TESTS.items():
                if time.monotonic() - began > _SECONDS:
                    results.append({"test": name, "device": device, "error": "no time left"})
                    continue
                results.append(run(name, test, device, dtype))
    failures = [result for result in results if "error" in result]
    print(
        json.dumps(
            {
                "passed": len(results) - len(failures),
                "failed": failures,
                "devices": devices,
                "seconds": round(time.monotonic() - began, 2),
                "build": info,
            }
        )
    )
    return 1 if failures else 0


def run(name: str, test: Callable[..., float], device: str, dtype: Any) -> dict[str, Any]:
    import torch

    result: dict[str, Any] = {"test": name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            error = test(device, dtype)
        limit = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        if not error <= limit:  # NaN fails too
            result["error"] = f"differs from torch by {error:.3g}, expected at most {limit:g}"
    except Exception as error:
        result["error"] = first_line(error)
    return result


def reference(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """Attention in float32 on (batch, length, heads, head_dim), causal to the bottom right."""
    import torch

    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.size(-2) - q.size(-2) + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def test_attention(device: str, dtype: Any) -> float:
    """Head dims of T3 and of larger models, a prompt and a step."""
    import torch

    from vivace import ops

    worst = 0.0
    for head_dim, queries, causal in ((64, 70, True), (64, 1, True), (128, 33, False)):
        q = torch.randn(2, queries, 4, head_dim, device=device, dtype=dtype)
        k, v = torch.randn(2, 2, 70, 4, head_dim, device=device, dtype=dtype)
        out = ops.attention(q, k, v, causal=causal)
        worst = max(worst, float((out.float() - reference(q, k, v, causal)).abs().max()))
    return worst


def test_attention_with_kvcache(device: str, dtype: Any) -> float:
    import torch

    from vivace import ops

    k_cache, v_cache = torch.randn(2, 3, 40, 4, 64, device=device, dtype=dtype)
    q, k, v = torch.randn(3, 2, 1, 4, 64, device=device, dtype=dtype)
    lengths = torch.tensor([39, 12], dtype=torch.int32, device=device)
    rows = torch.tensor([2, 0], dtype=torch.int32, device=device)
    out = ops.attention_with_kvcache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, cache_batch_idx=rows, causal=True
    )
    worst = 0.0
    for i, (length, row) in enumerate(zip(lengths.tolist(), rows.tolist(), strict=True)):
        worst = max(worst, float((k_cache[row, length] - k[i, 0]).abs().max()))
        expected = reference(
            q[i : i + 1], k_cache[row : row + 1, : length + 1], v_cache[row : row + 1, : length + 1], True
        )
        worst = max(worst, float((out[i : i + 1].float() - expected).abs().max()))
    return worst


def test_rms_norm(device: str, dtype: Any) -> float:
    import torch

    from vivace import ops

    x, weight = torch.randn(5, 256, device=device, dtype=dtype), torch.randn(256, device=device, dtype=dtype)
    expected = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()
    return float((ops.rms_norm(x, weight, 1e-5).float() - expected).abs().max()) / 4


def test_silu_gate(device: str, dtype: Any) -> float:
    import torch

    from vivace import ops

    x = torch.randn(5, 512, device=device, dtype=dtype)
    gate, up = x.float().chunk(2, dim=-1)
    return float((ops.silu_gate(x).float() - torch.nn.functional.silu(gate) * up).abs().max()) / 4


TESTS = {
    "attention": test_attention,
    "attention_with_kvcache": test_attention_with_kvcache,
    "rms_norm": test_rms_norm,
    "silu_gate": test_silu_gate,
}

if __name__ == "__main__":
    sys.exit(main())
