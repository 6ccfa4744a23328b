"""Errors of the operators: each names the operator, the argument, what came and what was expected."""

import re

import pytest
import torch

from .cases import OPS, cumulative

I32, F32, F16, BF16 = torch.int32, torch.float32, torch.float16, torch.bfloat16


def t(*shape, dtype=F32):
    return torch.zeros(*shape, dtype=dtype)


def ints(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def attention(**changes):
    arguments = {"q": t(2, 8, 4, 64), "k": t(2, 9, 2, 64), "v": t(2, 9, 2, 64), **changes}
    return OPS.attention(**arguments)


def varlen(**changes):
    arguments = {
        "q": t(8, 4, 64),
        "k": t(9, 2, 64),
        "v": t(9, 2, 64),
        "cu_seqlens_q": ints(0, 3, 8),
        "cu_seqlens_k": ints(0, 4, 9),
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
        **changes,
    }
    return OPS.attention_varlen(**arguments)


def kvcache(**changes):
    arguments = {
        "q": t(2, 1, 4, 64),
        "k_cache": t(2, 16, 2, 64),
        "v_cache": t(2, 16, 2, 64),
        "k": t(2, 1, 2, 64),
        "v": t(2, 1, 2, 64),
        "cache_seqlens": ints(3, 5),
        **changes,
    }
    return OPS.attention_with_kvcache(**arguments)


def backward(**changes):
    arguments = {
        "dout": t(2, 8, 4, 64),
        "q": t(2, 8, 4, 64),
        "k": t(2, 9, 2, 64),
        "v": t(2, 9, 2, 64),
        "out": t(2, 8, 4, 64),
        "softmax_lse": t(2, 4, 8),
        **changes,
    }
    return OPS.attention_backward(**arguments)


def sample(**changes):
    arguments = {
        "logits": t(4, 50),
        "rows": torch.tensor([[0, 1], [2, 3]], dtype=I32),
        "seen": t(2, 50, dtype=torch.uint8),
        "cfg_weight": t(2),
        "temperature": torch.ones(2),
        "repetition_penalty": torch.ones(2),
        "min_p": t(2),
        "top_p": torch.ones(2),
        "top_k": ints(0, 0),
        "seed": ints(1, 2, dtype=torch.int64),
        "step": ints(0, 0, dtype=torch.int64),
        **changes,
    }
    return OPS.sample(**arguments)


def rotary(**changes):
    return OPS.rotary_embedding(**{"x": t(5, 2, 64), "cos": t(10, 32), "sin": t(10, 32), **changes})


def strided_last(*shape):
    return t(*shape[:-1], 2 * shape[-1])[..., ::2]


PAGES = {"k_cache": t(6, 4, 2, 64), "v_cache": t(6, 4, 2, 64), "block_table": torch.arange(6, dtype=I32).view(2, 3)}
NONE = {"k": None, "v": None}

# operator, changes to a good call, and patterns that the message must all contain
CASES = {
    "k dtype": (attention, {"k": t(2, 9, 2, 64, dtype=F16)}, [r"\bk\b", "float16", "float32"]),
    "v dtype": (attention, {"v": t(2, 9, 2, 64, dtype=BF16)}, [r"\bv\b", "bfloat16", "float32"]),
    "q integer": (attention, {"q": t(2, 8, 4, 64, dtype=I32)}, [r"\bq\b", "int32", "float32", "bfloat16"]),
    "head_dim": (
        attention,
        {"k": t(2, 9, 2, 96)},
        [r"\bk has head_dim 96", "64", r"\[2, 9, 2, 96\]", r"\[2, 8, 4, 64\]"],
    ),
    "heads": (attention, {"k": t(2, 9, 3, 64), "v": t(2, 9, 3, 64)}, [r"\b4\b", r"\b3\b", "heads", "multiple"]),
    "no kv heads": (attention, {"k": t(2, 9, 0, 64), "v": t(2, 9, 0, 64)}, [r"\b0\b", "heads"]),
    "batch": (attention, {"k": t(3, 9, 2, 64), "v": t(3, 9, 2, 64)}, [r"\bk\b", "batch", r"\b3\b", r"\b2\b"]),
    "v length": (attention, {"v": t(2, 10, 2, 64)}, [r"\bv\b", r"\[2, 10, 2, 64\]", r"\[2, 9, 2, 64\]"]),
    "q dimensions": (attention, {"q": t(8, 4, 64)}, [r"\bq\b", "3 dimensions", "4"]),
    "last stride": (attention, {"q": strided_last(2, 8, 4, 64)}, [r"\bq\b", "stride 2", "expected 1"]),
    "head_dim 257": (
        attention,
        {"q": t(1, 2, 1, 257), "k": t(1, 2, 1, 257), "v": t(1, 2, 1, 64)},
        [r"\bq\b", "257", "256"],
    ),
    "head_dim_v 300": (attention, {"v": t(2, 9, 2, 300)}, [r"\bv\b", "300", "256"]),
    "alibi dtype": (attention, {"alibi_slopes": t(4, dtype=F16)}, ["alibi_slopes", "float16", "float32"]),
    "alibi shape": (attention, {"alibi_slopes": t(5)}, ["alibi_slopes", r"\[5\]", r"\[4\]"]),
    "alibi batch": (attention, {"alibi_slopes": t(3, 4)}, ["alibi_slopes", r"\[3, 4\]", r"\[2, 4\]"]),
    "bias dtype": (attention, {"bias": t(1, 1, 8, 9, dtype=torch.int64)}, ["bias", "int64", "float32", "bool"]),
    "bias shape": (attention, {"bias": t(1, 3, 8, 9)}, ["bias", r"\[1, 3, 8, 9\]", r"2, 4, 8, 9"]),
    "bias dimensions": (attention, {"bias": t(8, 9)}, ["bias", "2 dimensions", "4"]),
    "sinks shape": (attention, {"sinks": t(2)}, ["sinks", r"\[2\]", r"\[4\]"]),
    "sinks dtype": (attention, {"sinks": t(4, dtype=BF16)}, ["sinks", "bfloat16", "float32"]),
    "dropout_p": (attention, {"dropout_p": 1.0, "rng_state": ints(1, 2, dtype=torch.int64)}, ["dropout_p", r"\b1\b"]),
    "dropout negative": (attention, {"dropout_p": -0.5}, ["dropout_p", r"-0\.5"]),
    "no rng_state": (attention, {"dropout_p": 0.1}, ["rng_state", "missing", r"0\.1"]),
    "rng_state dtype": (attention, {"dropout_p": 0.1, "rng_state": ints(1, 2)}, ["rng_state", "int32", "int64"]),
    "softcap": (attention, {"softcap": -1.0}, ["softcap", "-1"]),
    "scale": (attention, {"softmax_scale": float("nan")}, ["softmax_scale", "nan", "finite"]),
    "varlen bias": (varlen, {"bias": t(1, 4, 8, 9)}, ["bias", "not supported"]),
    "cu dtype": (varlen, {"cu_seqlens_q": ints(0, 3, 8, dtype=torch.int64)}, ["cu_seqlens_q", "int64", "int32"]),
    "cu size": (varlen, {"cu_seqlens_k": ints(0, 4, 8, 9)}, ["cu_seqlens_k", r"\[4\]", r"\[3\]"]),
    "cu start": (varlen, {"cu_seqlens_q": ints(1, 3, 8)}, ["cu_seqlens_q", r"\b1\b", "expected 0"]),
    "cu order": (varlen, {"cu_seqlens_q": ints(0, 9, 8)}, ["cu_seqlens_q", r"\b9\b", r"\b8\b|max_seqlen"]),
    "cu end": (varlen, {"cu_seqlens_k": ints(0, 4, 10), "max_seqlen_k": 9}, ["cu_seqlens_k", r"\b10\b", r"\b9\b"]),
    "max_seqlen": (varlen, {"max_seqlen_q": 4}, ["cu_seqlens_q", r"\b5\b", r"\b4\b"]),
    "seqused": (varlen, {"seqused_k": ints(5, 5)}, ["seqused_k", r"\b5\b", r"\b4\b"]),
    "seqused dtype": (varlen, {"seqused_k": ints(1, 2, dtype=torch.int64)}, ["seqused_k", "int64", "int32"]),
    "varlen pages": (varlen, {"block_table": ints(0, 1).view(2, 1)}, [r"\bk\b", "3 dimensions", "block_table"]),
    "cache dtype": (kvcache, {"k_cache": t(2, 16, 2, 64, dtype=F16)}, ["k_cache", "float16", "float32"]),
    "cache heads": (kvcache, {"k": t(2, 1, 4, 64), "v": t(2, 1, 4, 64)}, [r"\bk\b", r"\b4\b", "k_cache", r"\b2\b"]),
    "cache rows": (
        kvcache,
        {"k_cache": t(1, 16, 2, 64), "v_cache": t(1, 16, 2, 64)},
        ["k_cache", r"\b1\b", "batch", r"\b2\b"],
    ),
    "k alone": (kvcache, {"v": None}, [r"\bk\b", "without v"]),
    "seqlens dtype": (kvcache, {"cache_seqlens": ints(3, 5, dtype=torch.int64)}, ["cache_seqlens", "int64", "int32"]),
    "seqlens size": (kvcache, {"cache_seqlens": ints(3)}, ["cache_seqlens", r"\[1\]", r"\[2\]"]),
    "seqlens missing": (kvcache, {"cache_seqlens": None}, ["cache_seqlens", "missing"]),
    "seqlens negative": (kvcache, {"cache_seqlens": ints(3, -1)}, ["cache_seqlens", "-1"]),
    "seqlens large": (kvcache, {**NONE, "cache_seqlens": ints(3, 17)}, [r"\b17\b", "capacity", r"\b16\b"]),
    "capacity": (kvcache, {"cache_seqlens": ints(3, 16)}, [r"row 1\b", r"\b16\b", "capacity"]),
    "batch_idx dtype": (
        kvcache,
        {"cache_batch_idx": ints(0, 1, dtype=torch.int64)},
        ["cache_batch_idx", "int64", "int32"],
    ),
    "batch_idx range": (kvcache, {"cache_batch_idx": ints(0, 2)}, ["cache_batch_idx", r"\b2\b"]),
    "leftpad dtype": (kvcache, {"cache_leftpad": t(2)}, ["cache_leftpad", "float32", "int32"]),
    "leftpad range": (kvcache, {"cache_leftpad": ints(0, 9)}, ["cache_leftpad", r"\b9\b"]),
    "table dtype": (kvcache, {**PAGES, "block_table": torch.zeros(2, 3)}, ["block_table", "float32", "int32"]),
    "table rows": (
        kvcache,
        {**PAGES, "block_table": torch.zeros(3, 3, dtype=I32)},
        ["block_table", r"\b3\b", r"\b2\b"],
    ),
    "page range": (
        kvcache,
        {**PAGES, "block_table": torch.full((2, 3), 6, dtype=I32)},
        ["block_table", r"\b6\b", r"\b5\b"],
    ),
    "page negative": (kvcache, {**PAGES, "block_table": torch.full((2, 3), -1, dtype=I32)}, ["block_table", "-1"]),
    "table and idx": (kvcache, {**PAGES, "cache_batch_idx": ints(0, 1)}, ["cache_batch_idx", "block_table"]),
    "table and leftpad": (kvcache, {**PAGES, "cache_leftpad": ints(0, 1)}, ["cache_leftpad", "block_table"]),
    "expanded cache": (
        kvcache,
        {"k_cache": t(1, 16, 2, 64).expand(2, 16, 2, 64), "v_cache": t(2, 16, 2, 64)},
        ["k_cache", "expanded", "memory"],
    ),
    "cos alone": (kvcache, {"rotary_cos": t(20, 32)}, ["rotary_cos", "rotary_sin"]),
    "rotary without k": (
        kvcache,
        {**NONE, "rotary_cos": t(20, 32), "rotary_sin": t(20, 32)},
        ["rotary_cos", r"without k\b"],
    ),
    "rotary wide": (kvcache, {"rotary_cos": t(20, 33), "rotary_sin": t(20, 33)}, ["rotary_cos", r"\b66\b", r"\b64\b"]),
    "rotary short": (kvcache, {"rotary_cos": t(5, 32), "rotary_sin": t(5, 32)}, ["rotary_cos", r"\b5\b", r"\b6\b"]),
    "rotary shapes": (
        kvcache,
        {"rotary_cos": t(20, 32), "rotary_sin": t(20, 16)},
        ["rotary_sin", r"\[20, 16\]", r"\[20, 32\]"],
    ),
    "ragged q": (
        kvcache,
        {"cu_seqlens_q": ints(0, 1, 2), "max_seqlen_q": 1},
        [r"\bq\b", "4 dimensions", "cu_seqlens_q"],
    ),
    "num_splits": (kvcache, {"num_splits": -1}, ["num_splits", "-1"]),
    "probe shape": (kvcache, {"probe": t(2, 1, 15), "probe_head": 0}, ["probe", r"\[2, 1, 15\]", r"\[2, 1, 16\]"]),
    "probe dtype": (kvcache, {"probe": t(2, 1, 16, dtype=F16), "probe_head": 0}, ["probe", "float16", "float32"]),
    "probe head": (kvcache, {"probe": t(2, 1, 16), "probe_head": 4}, ["probe_head", r"\b4\b", r"\b3\b"]),
    "dout shape": (backward, {"dout": t(2, 8, 4, 32)}, ["dout", r"\[2, 8, 4, 32\]", r"\[2, 8, 4, 64\]"]),
    "lse dtype": (backward, {"softmax_lse": t(2, 4, 8, dtype=F16)}, ["softmax_lse", "float16", "float32"]),
    "lse shape": (backward, {"softmax_lse": t(2, 8, 4)}, ["softmax_lse", r"\[2, 8, 4\]", r"\[2, 4, 8\]"]),
    "weight shape": (lambda **_: OPS.rms_norm(t(3, 64), t(63)), {}, [r"rms_norm: weight", r"\[63\]", r"\[64\]"]),
    "weight dtype": (lambda **_: OPS.rms_norm(t(3, 64), t(64, dtype=F16)), {}, ["weight", "float16", "float32"]),
    "eps": (lambda **_: OPS.rms_norm(t(3, 64), t(64), -1.0), {}, ["eps", "-1"]),
    "residual shape": (
        lambda **_: OPS.add_rms_norm(t(3, 64), t(2, 64), t(64)),
        {},
        [r"add_rms_norm: residual", r"\[2, 64\]", r"\[3, 64\]"],
    ),
    "residual expanded": (
        lambda **_: OPS.add_rms_norm(t(3, 64), t(1, 64).expand(3, 64), t(64)),
        {},
        ["residual", "expanded", "memory"],
    ),
    "gate odd": (lambda **_: OPS.silu_gate(t(3, 63)), {}, [r"silu_gate: gate_up", r"\[3, 63\]", "2 "]),
    "gate dtype": (lambda **_: OPS.silu_gate(t(3, 64, dtype=I32)), {}, ["gate_up", "int32", "float32"]),
    "rotary dims": (rotary, {"x": t(5, 64)}, [r"\bx\b", "2 dimensions"]),
    "rotary cos dtype": (rotary, {"cos": t(10, 32, dtype=torch.float64)}, ["cos", "float64", "float32"]),
    "rotary sin shape": (rotary, {"sin": t(10, 31)}, ["sin", r"\[10, 31\]", r"\[10, 32\]"]),
    "positions dtype": (rotary, {"positions": t(5)}, ["positions", "float32", "int32"]),
    "positions size": (rotary, {"positions": ints(0, 1)}, ["positions", r"\[2\]", r"\[5\]"]),
    "positions range": (rotary, {"positions": ints(0, 1, 2, 10, 0)}, ["positions", r"\b10\b"]),
    "positions few": (rotary, {"x": t(11, 2, 64)}, ["cos", r"\b10\b", r"\b11\b"]),
    "logits dims": (sample, {"logits": t(4, 2, 50)}, ["logits", "3 dimensions", "2"]),
    "rows dtype": (sample, {"rows": torch.zeros(2, 2, dtype=torch.int64)}, ["rows", "int64", "int32"]),
    "rows range": (sample, {"rows": torch.tensor([[0, 1], [4, -1]], dtype=I32)}, ["rows", r"\b4\b"]),
    "seen shape": (sample, {"seen": t(2, 49, dtype=torch.uint8)}, ["seen", r"\[2, 49\]", r"\[2, 50\]"]),
    "seen dtype": (sample, {"seen": t(2, 50)}, ["seen", "float32", "uint8"]),
    "temperature size": (sample, {"temperature": torch.ones(3)}, ["temperature", r"\[3\]", r"\[2\]"]),
    "temperature negative": (sample, {"temperature": torch.tensor([1.0, -1.0])}, ["temperature", "-1"]),
    "penalty": (sample, {"repetition_penalty": torch.tensor([1.0, 0.0])}, ["repetition_penalty", r"\b0\b"]),
    "top_k dtype": (sample, {"top_k": t(2)}, ["top_k", "float32", "int32"]),
    "seed dtype": (sample, {"seed": ints(1, 2)}, ["seed", "int32", "int64"]),
}
OPERATORS = {
    attention: "attention",
    varlen: "attention_varlen",
    kvcache: "attention_with_kvcache",
    backward: "attention_backward",
    sample: "sample",
    rotary: "rotary_embedding",
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(name):
    call, changes, patterns = CASES[name]
    with pytest.raises(RuntimeError) as error:
        call(**changes)
    message = str(error.value)
    first = message.splitlines()[0]
    assert re.search(rf"vivace\.{OPERATORS.get(call, '[a-z_]+')}: ", message), message
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in: {first}"


@pytest.mark.parametrize("call", OPERATORS, ids=OPERATORS.values())
def test_the_unchanged_call_is_accepted(call):
    call()


def test_a_bad_call_leaves_the_cache_untouched():
    k_cache, v_cache = torch.ones(2, 16, 2, 64), torch.ones(2, 16, 2, 64)
    with pytest.raises(RuntimeError):
        kvcache(k_cache=k_cache, v_cache=v_cache, cache_seqlens=ints(3, 16))
    assert (k_cache == 1).all() and (v_cache == 1).all()


def test_an_unknown_architecture_is_refused():
    with pytest.raises(RuntimeError, match=r"vivace\.force_arch: .*75.*80"):
        OPS.force_arch(75)
    assert OPS.force_arch(0) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v", "bias", "alibi_slopes", "sinks"])
def test_tensors_on_two_devices_are_refused(name):
    good = {
        "q": t(2, 8, 4, 64),
        "k": t(2, 9, 2, 64),
        "v": t(2, 9, 2, 64),
        "bias": t(1, 1, 8, 9),
        "alibi_slopes": t(4),
        "sinks": t(4),
    }
    moved = {key: value if key == name else value.cuda() for key, value in good.items()}
    with pytest.raises(RuntimeError, match=rf"vivace\.attention: {name} is on cpu, q is on cuda:0"):
        OPS.attention(**moved)


@pytest.mark.gpu
def test_cu_seqlens_on_the_cpu_is_refused_for_cuda_tensors():
    q, k, v = t(8, 4, 64).cuda(), t(9, 2, 64).cuda(), t(9, 2, 64).cuda()
    with pytest.raises(RuntimeError, match="cu_seqlens_q is on cpu"):
        OPS.attention_varlen(q, k, v, cumulative((3, 5)), cumulative((4, 5)), 5, 5)
