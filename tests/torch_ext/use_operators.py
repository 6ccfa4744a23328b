"""Runs with the Python of any torch: uses the operator library there, and saves a TorchScript module that calls it.

Usage: use_operators.py PYTHON_DIR MODULE.pt, with VIVACE_OPS_LIBRARY set. Prints one line of JSON.
"""

import json
import sys
import warnings

sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own

import torch  # noqa: E402

import vivace.ops  # noqa: E402


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.ops.vivace.attention(q, k, v, causal=True)[0]


def main():
    torch.manual_seed(0)
    worst = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = torch.randn(2, 7, 4, 64), torch.randn(2, 7, 4, 64), torch.randn(2, 7, 4, 64)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        out = vivace.attention(q, k, v, causal=True)
        heads = [t.double().transpose(1, 2) for t in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        worst[str(dtype)] = (out.double() - expected).abs().max().item()

    k_cache, v_cache = torch.zeros(2, 16, 4, 64), torch.zeros(2, 16, 4, 64)
    lengths = torch.zeros(2, dtype=torch.int32)
    q, k, v = torch.randn(2, 5, 4, 64), torch.randn(2, 5, 4, 64), torch.randn(2, 5, 4, 64)
    vivace.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    appended = torch.equal(k_cache[:, :5], k) and torch.equal(v_cache[:, :5], v)

    x = torch.randn(3, 8, requires_grad=True)
    vivace.silu_gate(x).sum().backward()
    gate, up = x.detach().requires_grad_().chunk(2, -1)
    (expected_grad,) = torch.autograd.grad((torch.nn.functional.silu(gate) * up).sum(), (gate,))
    gradient = torch.allclose(x.grad[:, :4], expected_grad, atol=1e-6)

    compiled = torch.compile(vivace.rms_norm, fullgraph=True, backend="eager")
    x, weight = torch.randn(3, 8), torch.randn(8)
    compiles = torch.equal(compiled(x, weight), vivace.rms_norm(x, weight))

    torch.jit.save(torch.jit.script(Attention()), sys.argv[2])
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "worst": worst,
                "appended": appended,
                "gradient": gradient,
                "compiles": compiles,
                "build": vivace.build_info(),
            }
        )
    )


main()
