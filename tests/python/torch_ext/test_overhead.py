"""The operators' dispatch is cheap: a decode step calls them by the hundred."""

import time

import torch
import torch.nn.functional as F

import vivace.ops  # noqa: F401

OPS = torch.ops.vivace


def seconds_per_call(function, calls=500, repeats=20):
    """Processor time of the best of several runs, which other load on the machine disturbs least."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(calls):
            function()
        best = min(best, time.process_time() - start)
    return best / calls


def test_a_tiny_call_costs_no_more_than_twice_that_of_torchs_own_operators():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            q, k, v = torch.randn(3, 1, 1, 1, 8)
            heads = [t.transpose(1, 2) for t in (q, k, v)]
            x, weight = torch.randn(1, 8), torch.ones(8)
            cache = torch.zeros(2, 1, 4, 1, 8)
            lengths = torch.zeros(1, dtype=torch.int32)
            sdpa = seconds_per_call(lambda: F.scaled_dot_product_attention(*heads))
            attention = seconds_per_call(lambda: OPS.attention(q, k, v))
            cached = seconds_per_call(lambda: OPS.attention_with_kvcache(q, *cache, k, v, lengths, causal=True))
            norm = seconds_per_call(lambda: F.rms_norm(x, (8,), weight))
            rms_norm = seconds_per_call(lambda: OPS.rms_norm(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert attention < 2 * sdpa, f"attention {attention * 1e6:.1f} us, torch's {sdpa * 1e6:.1f} us"
    assert cached < 3 * sdpa, f"attention_with_kvcache {cached * 1e6:.1f} us, torch's attention {sdpa * 1e6:.1f} us"
    assert rms_norm < 2 * norm, f"rms_norm {rms_norm * 1e6:.1f} us, torch's {norm * 1e6:.1f} us"
