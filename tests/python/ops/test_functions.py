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


@pytest.mark.parametrize("window", [5, None, (1,), (1, 2, 3)])
def test_a_window_that_is_no_pair_is_named(window):
    q = torch.randn(1, 4, 2, 32)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    for call in (
        lambda: ops.attention(q, q, q, window_size=window),
        lambda: ops.attention_varlen(q[0], q[0], q[0], offsets, offsets, 4, 4, window_size=window),
        lambda: ops.attention_with_kvcache(q, q, q, window_size=window),
        lambda: ops.attention_with_kvcache(q, q, q, window_size=window, softcap=1.0),
    ):
        with pytest.raises(ValueError, match=r"vivace\.attention\w*: window_size is .*, expected a pair"):
            call()


@pytest.mark.parametrize("wrong", [None, [1.0], 3])
@pytest.mark.parametrize("at", ["q", "k", "v"])
def test_an_argument_that_is_no_tensor_is_named(at, wrong):
    arguments = {name: torch.randn(1, 4, 2, 32) for name in "qkv"} | {at: wrong}
    with pytest.raises(TypeError, match=rf"vivace\.attention: {at} is of type \w+, expected a tensor"):
        ops.attention(**arguments)


def test_a_tensor_without_data_among_others_is_an_error():
    """And not a result that nobody has computed."""
    q, offsets = torch.randn(1, 4, 2, 32), torch.tensor([0, 4], dtype=torch.int32)
    meta = q.to("meta")
    for call, named in (
        (lambda: ops.attention(q, meta, q), "attention: k"),
        (lambda: ops.attention(q, q, q, sinks=torch.zeros(2, device="meta")), "attention: sinks"),
        (lambda: ops.attention_varlen(q[0], q[0], meta[0], offsets, offsets, 4, 4), "attention_varlen: v"),
        (lambda: ops.attention_with_kvcache(q, q, meta), "attention_with_kvcache: v_cache"),
        (lambda: ops.rms_norm(q, torch.ones(32, device="meta")), "rms_norm: weight"),
    ):
        with pytest.raises(RuntimeError, match=rf"vivace\.{named} is on meta, \w+ is on cpu; all"):
            call()
    with pytest.raises(RuntimeError, match=r"vivace\.attention: k is on cpu, q is on meta"):
        ops.attention(meta, q, q)
    assert ops.attention(meta, meta, meta).is_meta
