"""vivace.ops over the operators: what the Python functions leave out or add changes nothing."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vivace import ops

from .cases import OPS

KVCACHE_OPTIONS = {
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.7},
    "window": {"window_size": (3, 0)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "rows": {"cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32)},
    "leftpad": {"cache_leftpad": torch.tensor([1, 4], dtype=torch.int32)},
    "splits": {"num_splits": 2},
    "rotary": {"rotary_cos": torch.rand(16, 8).cos(), "rotary_sin": torch.rand(16, 8).sin()},
    "rotary halves": {
        "rotary_cos": torch.rand(16, 8).cos(),
        "rotary_sin": torch.rand(16, 8).sin(),
        "rotary_interleaved": False,
        "causal": True,
    },
    "pages": {"block_table": torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)},
}


def kvcache_tensors(seqlen):
    q = torch.randn(2, seqlen, 4, 32)
    caches = [torch.randn(4, 16, 2, 32) for _ in range(2)]
    new = [torch.randn(2, seqlen, 2, 32) for _ in range(2)]
    return q, caches, new, torch.tensor([5, 9], dtype=torch.int32)


@pytest.mark.parametrize("seqlen", [1, 3])
@pytest.mark.parametrize(
    "names", [(), *((n,) for n in KVCACHE_OPTIONS), ("causal", "window", "alibi", "rows", "leftpad")]
)
def test_attention_with_kvcache_has_the_bits_of_its_operator(names, seqlen):
    options = {k: v for name in names for k, v in KVCACHE_OPTIONS[name].items()}
    q, caches, new, lengths = kvcache_tensors(seqlen)
    copies = [c.clone() for c in caches]
    out, lse = ops.attention_with_kvcache(q, *caches, *new, cache_seqlens=lengths, return_lse=True, **options)
    left, right = options.pop("window_size", (-1, -1))
    expected = OPS.attention_with_kvcache(q, *copies, *new, lengths, window_left=left, window_right=right, **options)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert all(torch.equal(a, b) for a, b in zip(caches, copies, strict=True))


def test_attention_with_kvcache_is_seen_by_modes_as_its_overload():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, caches, new, lengths = kvcache_tensors(1)
    with Mode():
        ops.attention_with_kvcache(q, *caches, *new, cache_seqlens=lengths)
    assert OPS.attention_with_kvcache.default in seen
