"""A wrong argument gives an error that names the operator, the argument, what came and what was expected."""

import re

import pytest
import torch

import vivace.ops  # noqa: F401

OPS = torch.ops.vivace


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes):
    arguments = {"q": torch.randn(2, 5, 4, 16), "k": torch.randn(2, 7, 2, 16), "v": torch.randn(2, 7, 2, 16)}
    return OPS.attention(**{**arguments, **changes})


def varlen(**changes):
    arguments = {
        "q": torch.randn(8, 4, 16),
        "k": torch.randn(11, 2, 16),
        "v": torch.randn(11, 2, 16),
        "cu_seqlens_q": int32(0, 3, 8),
        "cu_seqlens_k": int32(0, 7, 11),
        "max_seqlen_q": 5,
        "max_seqlen_k": 7,
    }
    return OPS.attention_varlen(**{**arguments, **changes})


def cached(**changes):
    arguments = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.zeros(3, 8, 2, 16),
        "v_cache": torch.zeros(3, 8, 2, 16),
        "k": torch.randn(2, 1, 2, 16),
        "v": torch.randn(2, 1, 2, 16),
        "cache_seqlens": int32(0, 3),
    }
    return OPS.attention_with_kvcache(**{**arguments, **changes})


def sampled(**changes):
    arguments = {
        "logits": torch.randn(3, 11),
        "rows": torch.tensor([[0, 1], [2, -1]], dtype=torch.int32),
        "seen": torch.zeros(2, 11, dtype=torch.uint8),
        **{name: torch.ones(2) for name in ("cfg_weight", "temperature", "repetition_penalty", "min_p", "top_p")},
        "top_k": int32(0, 0),
        "seed": torch.tensor([1, 2]),
        "step": torch.tensor([0, 0]),
    }
    return OPS.sample(**{**arguments, **changes})


TABLE = torch.randn(9, 4)
PAGES = torch.zeros(6, 4, 2, 16)

WRONG = [
    (
        dense,
        {"k": torch.randn(2, 7, 2, 8)},
        "attention: k has head_dim 8, q has 16 (k: [2, 7, 2, 8], q: [2, 5, 4, 16])",
    ),
    (dense, {"k": torch.randn(2, 7, 3, 16)}, "attention: q has 4 heads, k has 3; q's must be a multiple of k's"),
    (dense, {"v": torch.randn(2, 6, 2, 16)}, "attention: v has shape [2, 6, 2, 16], k has [2, 7, 2, 16]"),
    (dense, {"k": torch.randn(1, 7, 2, 16), "v": torch.randn(1, 7, 2, 16)}, "attention: k has batch 1, q has 2"),
    (
        dense,
        {"q": torch.randn(5, 4, 16)},
        "attention: q has 3 dimensions [5, 4, 16], expected 4: (batch, seqlen_q, heads",
    ),
    (dense, {"k": torch.randn(2, 7, 2, 16).half()}, "attention: k is float16, expected float32"),
    (
        dense,
        {"q": torch.zeros(2, 5, 4, 16, dtype=torch.int32)},
        "attention: q is int32, expected float32, float16 or bfloat16",
    ),
    (dense, {"q": torch.zeros(2, 5, 4, 16, dtype=torch.complex64)}, "vivace: q is complex64, which no operator takes"),
    (
        dense,
        {"q": torch.randn(2, 5, 16, 4).transpose(2, 3)},
        "attention: q has stride 4 in its last dimension, expected 1",
    ),
    (
        dense,
        {"q": torch.randn(2, 5, 4, 264), "k": torch.randn(2, 7, 2, 264)},
        "attention: q has head_dim 264, expected 1 to 256",
    ),
    (dense, {"softcap": -1.0}, "attention: softcap is -1, expected 0 (off) or a positive number"),
    (dense, {"softmax_scale": float("nan")}, "attention: softmax_scale is nan, expected a finite number"),
    (dense, {"dropout_p": 1.0}, "attention: dropout_p is 1, expected at least 0 and less than 1"),
    (dense, {"dropout_p": 0.5}, "attention: rng_state is missing"),
    (dense, {"dropout_p": 0.5, "rng_state": int32(1, 2)}, "attention: rng_state is int32, expected int64"),
    (dense, {"alibi_slopes": torch.ones(3)}, "attention: alibi_slopes has shape [3], expected [4] (heads)"),
    (
        dense,
        {"alibi_slopes": torch.ones(2, 3)},
        "attention: alibi_slopes has shape [2, 3], expected [2, 4] (batch, heads)",
    ),
    (dense, {"sinks": torch.ones(4).double()}, "attention: sinks is float64, expected float32"),
    (dense, {"bias": torch.ones(5, 7)}, "attention: bias has 2 dimensions [5, 7], expected 4"),
    (dense, {"bias": torch.ones(1, 1, 5, 6)}, "broadcasts to (batch, heads, seqlen_q, seqlen_k) = (2, 4, 5, 7)"),
    (
        dense,
        {"bias": torch.ones(1, 1, 5, 7).half()},
        "attention: bias is float16, expected float32, q's float32 or bool",
    ),
    (varlen, {"cu_seqlens_q": torch.tensor([0, 3, 8])}, "attention_varlen: cu_seqlens_q is int64, expected int32"),
    (varlen, {"cu_seqlens_k": int32(0, 11)}, "attention_varlen: cu_seqlens_k has shape [2], expected [3] (batch + 1)"),
    (varlen, {"cu_seqlens_q": int32(1, 3, 8)}, "attention_varlen: cu_seqlens_q[0] is 1, expected 0"),
    (varlen, {"cu_seqlens_q": int32(0, 9, 8)}, "max_seqlen is 5"),
    (varlen, {"cu_seqlens_q": int32(0, 3, 2)}, "attention_varlen: cu_seqlens_q decreases from 3 to 2 at row 1"),
    (varlen, {"cu_seqlens_k": int32(0, 7, 12)}, "attention_varlen: cu_seqlens_k ends at 12, the tensor has 11 rows"),
    (varlen, {"seqused_q": int32(4, 1)}, "attention_varlen: seqused_q[0] is 4, cu_seqlens_q allots 3"),
    (varlen, {"seqused_k": int32(1, 5)}, "attention_varlen: seqused_k[1] is 5, cu_seqlens_k allots 4"),
    (varlen, {"bias": torch.ones(1, 1, 5, 7)}, "attention_varlen: bias is not supported with variable lengths"),
    (
        varlen,
        {"k": PAGES, "v": PAGES, "block_table": torch.tensor([[0, 6], [1, 2]], dtype=torch.int32)},
        "attention_varlen: block_table[0, 1] is 6, expected 0 to 5",
    ),
    (
        varlen,
        {"k": PAGES, "v": PAGES, "block_table": torch.tensor([[0], [1]], dtype=torch.int32)},
        "attention_varlen: block_table has 1 pages of 4 keys for row 0, which has 7 keys",
    ),
    (cached, {"v": None}, "attention_with_kvcache: k was given without v"),
    (cached, {"cache_seqlens": None}, "attention_with_kvcache: cache_seqlens is missing"),
    (cached, {"cache_seqlens": int32(0, 8)}, "row 1 of the cache has 8 keys and gets 1 more, its capacity is 8"),
    (cached, {"cache_seqlens": int32(0, -1)}, "attention_with_kvcache: cache_seqlens[1] is -1"),
    (cached, {"cache_batch_idx": int32(0, 3)}, "cache_batch_idx[1] is 3, k_cache has 3 rows"),
    (cached, {"cache_leftpad": int32(2, 0)}, "cache_leftpad[0] is 2, the row has 1 keys"),
    (
        cached,
        {"k_cache": torch.zeros(1, 8, 2, 16).expand(3, 8, 2, 16)},
        "k_cache is written in place, but it is expanded",
    ),
    (
        cached,
        {"k_cache": torch.zeros(1, 8, 2, 16), "v_cache": torch.zeros(1, 8, 2, 16)},
        "k_cache has 1 rows, the batch has 2",
    ),
    (cached, {"rotary_cos": TABLE}, "rotary_cos and rotary_sin go together; only one was given"),
    (cached, {"rotary_cos": TABLE, "rotary_sin": TABLE, "k": None, "v": None}, "rotary_cos was given without k"),
    (cached, {"rotary_cos": TABLE[:3], "rotary_sin": TABLE[:3]}, "rotary_cos has 3 positions, row 1 needs 4"),
    (
        cached,
        {"rotary_cos": torch.ones(9, 9), "rotary_sin": torch.ones(9, 9)},
        "that is rotary_dim 18, expected 2 to head_dim",
    ),
    (cached, {"probe": torch.zeros(2, 1, 7), "probe_head": 0}, "probe has shape [2, 1, 7], expected [2, 1, 8]"),
    (cached, {"probe": torch.zeros(2, 1, 8), "probe_head": 4}, "probe_head is 4, expected 0 to 3"),
    (cached, {"num_splits": 300}, "num_splits is 300, expected 0 (chosen) to 256"),
    (
        cached,
        {
            "k_cache": PAGES,
            "v_cache": PAGES,
            "block_table": torch.zeros(2, 2, dtype=torch.int32),
            "cache_batch_idx": int32(0, 1),
        },
        "cache_batch_idx does not go with block_table",
    ),
    (
        sampled,
        {"rows": torch.tensor([[0, 1], [3, -1]], dtype=torch.int32)},
        "sample: rows[1] is (3, -1), logits has 3 rows",
    ),
    (sampled, {"seen": torch.zeros(2, 11)}, "sample: seen is float32, expected uint8 or bool"),
    (sampled, {"top_k": torch.tensor([0, 0])}, "sample: top_k is int64, expected int32"),
    (sampled, {"min_p": torch.ones(3)}, "sample: min_p has shape [3], expected [2] (requests)"),
    (
        sampled,
        {"temperature": torch.tensor([1.0, -1.0])},
        "sample: temperature[1] is -1, expected at least 0 (0: greedy)",
    ),
    (sampled, {"repetition_penalty": torch.zeros(2)}, "sample: repetition_penalty[0] is 0, expected more than 0"),
]


@pytest.mark.parametrize(
    "call, changes, message", WRONG, ids=[f"{c.__name__}-{'-'.join(ch)}-{i}" for i, (c, ch, _) in enumerate(WRONG)]
)
def test_a_wrong_argument_is_named(call, changes, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(**changes)
    call()


def test_an_append_past_the_capacity_writes_nothing():
    cache = torch.zeros(3, 8, 2, 16)
    with pytest.raises(RuntimeError, match="its capacity is 8"):
        cached(k_cache=cache, v_cache=cache.clone(), cache_seqlens=int32(0, 8))
    assert torch.equal(cache, torch.zeros_like(cache))


def test_elementwise_operators_name_their_arguments():
    x = torch.randn(3, 8)
    for call, message in (
        (
            lambda: OPS.rms_norm(x, torch.ones(7)),
            "rms_norm: weight has shape [7], expected [8] (width), x's last dimension",
        ),
        (lambda: OPS.rms_norm(x, torch.ones(8).half()), "rms_norm: weight is float16, expected float32"),
        (
            lambda: OPS.rms_norm(torch.randn(4, 3, 8).transpose(0, 1), torch.ones(8)),
            "rms_norm: the rows of x are not evenly spaced",
        ),
        (
            lambda: OPS.add_rms_norm(x, torch.ones(3, 7), torch.ones(8)),
            "add_rms_norm: residual has shape [3, 7], x has [3, 8]",
        ),
        (lambda: OPS.add_rms_norm(x, x, torch.ones(8)), "add_rms_norm: residual and x are the same memory"),
        (
            lambda: OPS.add_rms_norm(x, x[:1].expand(3, 8), torch.ones(8)),
            "add_rms_norm: residual is written in place, but it is exp",
        ),
        (lambda: OPS.silu_gate(torch.randn(3, 7)), "silu_gate: gate_up has shape [3, 7], expected (..., 2 * width)"),
        (lambda: OPS.rotary_embedding(x, TABLE, TABLE), "rotary_embedding: x has 2 dimensions [3, 8]"),
        (
            lambda: OPS.rotary_embedding(torch.randn(10, 1, 8), TABLE, TABLE),
            "rotary_embedding: cos has 9 positions, x has 10 tokens in a row",
        ),
        (
            lambda: OPS.rotary_embedding_(torch.randn(2, 1, 8), TABLE, TABLE, torch.tensor([0, 9])),
            "rotary_embedding_: positions[1] is 9, cos has 9 positions",
        ),
    ):
        with pytest.raises(RuntimeError, match=re.escape("vivace." + message)):
            call()


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    q = torch.randn(2, 5, 4, 16, device="cuda").half()
    with pytest.raises(
        RuntimeError, match=re.escape("vivace.attention: k is on cpu, q is on cuda:0; all tensors must be on one")
    ):
        OPS.attention(q, q.cpu(), q)
