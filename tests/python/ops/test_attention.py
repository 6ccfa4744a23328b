"""vivace::attention: dense forward."""

import pytest
import torch

from reference.attention import attention
from reference.tolerance import assert_accurate, largest_error

from .cases import (
    HEAD_DIMS,
    HEADS,
    LAYOUTS,
    LENGTHS,
    LONG_LENGTHS,
    MASKS,
    OPS,
    Case,
    arrange,
    assert_lse,
    grid,
    lse_slack,
    make_bias,
    make_slopes,
)

BIASES = (
    None,
    None,
    ("fp32", "full"),
    ("dtype", "full"),
    ("bool", "full"),
    ("fp32", "keys"),
    ("bool", "one"),
    ("dtype", "heads"),
)


def check(q, k, v, **options):
    """Runs the operator and holds out and lse against the reference; returns out and lse."""
    out, lse = OPS.attention(q, k, v, **options)
    assert out.dtype == q.dtype and out.device == q.device
    exact, exact_lse = attention(q, k, v, **options)
    low, _ = attention(q, k, v, **options, compute=q.dtype)
    assert_accurate(out, exact, low)
    assert_lse(lse, exact_lse, lse_slack(options.get("softcap")))
    return out, lse


@grid(
    "attention",
    cpu=140,
    cuda=260,
    cuda_axes={"lengths": LENGTHS + LONG_LENGTHS},
    lengths=LENGTHS,
    heads=HEADS,
    head_dim=HEAD_DIMS,
    mask=MASKS,
    softcap=(0.0, 0.0, 15.0, 50.0),
    slopes=(None, None, "heads", "batch"),
    bias=BIASES,
    sinks=(False, False, True),
    layout=LAYOUTS,
    softmax_scale=(None, None, 0.3),
)
def test_attention_equals_the_reference(case):
    batch, (seqlen_q, seqlen_k), (heads, heads_kv) = 2, case.lengths, case.heads
    q = arrange(case.randn(batch, seqlen_q, heads, case.head_dim), case.layout)
    k, v = (arrange(case.randn(batch, seqlen_k, heads_kv, case.head_dim), case.layout) for _ in range(2))
    check(
        q,
        k,
        v,
        softmax_scale=case.softmax_scale,
        **MASKS[case.mask],
        softcap=case.softcap,
        alibi_slopes=make_slopes(case, case.slopes, batch, heads),
        bias=make_bias(case, case.bias, batch, heads, seqlen_q, seqlen_k),
        sinks=torch.randn(heads).to(case.device) if case.sinks else None,
    )


@grid(
    "attention_long",
    cpu=6,
    cuda=24,
    lengths=LONG_LENGTHS,
    head_dim=(64, 128),
    mask=("full", "causal"),
    heads=((2, 2), (4, 1)),
)
def test_attention_equals_the_reference_over_long_sequences(case):
    (seqlen_q, seqlen_k), (heads, heads_kv) = case.lengths, case.heads
    q = case.randn(1, seqlen_q, heads, case.head_dim)
    k, v = (case.randn(1, seqlen_k, heads_kv, case.head_dim) for _ in range(2))
    check(q, k, v, **MASKS[case.mask])


@grid(
    "attention_dim_v",
    cpu=9,
    cuda=18,
    dims=((192, 128), (64, 96), (96, 40), (59, 64), (256, 32)),
    mask=("full", "causal"),
)
def test_values_may_have_another_head_dim_than_keys(case):
    dim, dim_v = case.dims
    q, k, v = (case.randn(2, s, h, d) for s, h, d in ((33, 4, dim), (70, 2, dim), (70, 2, dim_v)))
    out, _ = check(q, k, v, **MASKS[case.mask])
    assert out.shape == (2, 33, 4, dim_v)


@grid("attention_bias_strides", cpu=6, cuda=12, kind=(("fp32", "full"), ("dtype", "full"), ("bool", "full")))
def test_bias_may_be_any_strided_view(case):
    q, k, v = (case.randn(2, s, 3, 40) for s in (19, 35, 35))
    bias = make_bias(case, case.kind, 2, 3, 35, 19).transpose(2, 3)
    check(q, k, v, bias=bias)
    check(q, k, v, bias=bias[:1, 1:2].expand(2, 3, 19, 35))


@grid("attention_empty_rows", cpu=6, cuda=9, head_dim=(64, 40))
def test_rows_that_see_no_key_return_zero_and_minus_infinity(case):
    q, k, v = (case.randn(2, s, 2, case.head_dim) for s in (150, 20, 20))
    out, lse = check(q, k, v, causal=True)
    assert (out[:, :130] == 0).all() and (out[:, 130:] != 0).any()
    assert torch.isneginf(lse[:, :, :130]).all() and torch.isfinite(lse[:, :, 130:]).all()
    hidden = torch.ones(1, 1, 150, 20, dtype=torch.bool, device=case.device)
    hidden[:, :, 77] = False
    out, lse = check(q, k, v, bias=hidden)
    assert (out[:, 77] == 0).all() and torch.isneginf(lse[:, :, 77]).all()
    minus = torch.zeros(1, 1, 150, 20, device=case.device)
    minus[:, :, 3] = -torch.inf
    out, lse = check(q, k, v, bias=minus)
    assert (out[:, 3] == 0).all() and torch.isneginf(lse[:, :, 3]).all()


@grid("attention_zero", cpu=3, cuda=6)
def test_zero_lengths_and_zero_batch_give_empty_or_zero_outputs(case):
    for batch, seqlen_q, seqlen_k in ((0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)):
        q, k, v = (case.randn(batch, s, h, 64) for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
        out, lse = OPS.attention(q, k, v, causal=True)
        assert out.shape == (batch, seqlen_q, 4, 64) and lse.shape == (batch, 4, seqlen_q)
        assert (out == 0).all() and torch.isneginf(lse).all()


@grid("attention_single", cpu=3, cuda=6, mask=("full", "causal"))
def test_one_key_gives_its_value_back(case):
    q, k, v = (case.randn(3, 1, 2, 64) for _ in range(3))
    out, lse = OPS.attention(q, k, v, **MASKS[case.mask])
    assert torch.equal(out, v)
    assert_lse(lse, torch.einsum("bihd,bjhd->bhij", q.double(), k.double())[..., 0] / 8, 1e-5)


@grid("attention_nan_q", cpu=3, cuda=9, bad=(float("nan"), float("inf")))
def test_nan_in_a_query_stays_in_its_row(case):
    q, k, v = (case.randn(2, s, 4, 64) for s in (70, 90, 90))
    clean, clean_lse = OPS.attention(q, k, v)
    q[1, 33, 2, 5] = case.bad
    out, lse = OPS.attention(q, k, v)
    assert out[1, 33, 2].isnan().all()
    out[1, 33, 2], lse[1, 2, 33] = clean[1, 33, 2], clean_lse[1, 2, 33]
    assert largest_error(out, clean) == 0 and largest_error(lse, clean_lse) == 0


@grid("attention_nan_k", cpu=3, cuda=9, where=("k", "v"), bad=(float("nan"), float("inf")))
def test_nan_in_a_key_or_value_reaches_only_rows_that_see_it(case):
    q, k, v = (case.randn(2, 150, 4, 64) for _ in range(3))
    clean, clean_lse = OPS.attention(q, k, v, causal=True)
    {"k": k, "v": v}[case.where][1, 70, 2] = case.bad
    out, lse = OPS.attention(q, k, v, causal=True)
    assert largest_error(out[1, :70], clean[1, :70]) == 0, "a row before the bad key changed"
    assert largest_error(lse[1, :, :70], clean_lse[1, :, :70]) == 0
    assert not torch.isfinite(out[1, 70, 2]).all(), "a bad key in sight must not be hidden"
    others = [0, 1, 3]
    assert largest_error(out[1][:, others], clean[1][:, others]) == 0 and largest_error(out[0], clean[0]) == 0


@grid("attention_large", cpu=3, cuda=15, head_dim=(64, 96, 128, 192, 256))
def test_large_scores_do_not_overflow(case):
    q, k, v = (case.randn(1, s, 2, case.head_dim, scale=scale) for s, scale in ((65, 30.0), (130, 30.0), (130, 1.0)))
    out, lse = check(q, k, v, causal=True)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


@grid(
    "attention_dropout",
    cpu=12,
    cuda=27,
    p=(0.17, 0.5, 0.9),
    mask=("full", "causal", "both"),
    lengths=((113, 203), (33, 16), (128, 97)),
)
def test_dropout_keeps_what_philox_says(case):
    (seqlen_q, seqlen_k), heads = case.lengths, 4
    q, k, v = (case.randn(2, s, h, 64) for s, h in ((seqlen_q, heads), (seqlen_k, 2), (seqlen_k, 2)))
    state = torch.tensor([0x123456789ABCDEF, 77], device=case.device)
    options = {**MASKS[case.mask], "dropout_p": case.p, "rng_state": state}
    out, lse = check(q, k, v, **options)
    _, without_lse = OPS.attention(q, k, v, **MASKS[case.mask])  # another kernel family may run it: not the same bits
    assert_lse(lse, without_lse, lse_slack(0.0))
    assert not torch.equal(out, OPS.attention(q, k, v, **{**options, "rng_state": state + 1})[0])
    assert torch.equal(out, OPS.attention(q, k, v, **options)[0])


@grid("attention_dropout_rate", cpu=2, cuda=6, dtypes=("fp32", "bf16"))
def test_dropout_drops_the_fraction_asked_for(case):
    n, p = 256, 0.17
    q = torch.zeros(1, n, 4, n, dtype=case.dtype, device=case.device)
    v = torch.eye(n, dtype=case.dtype, device=case.device)[None, :, None].expand(1, n, 4, n)
    out, _ = OPS.attention(q, q, v, dropout_p=p, rng_state=torch.tensor([1, 0], device=case.device))
    assert abs(float((out == 0).double().mean()) - p) < 0.01
    assert_accurate(
        out[out != 0],
        torch.full_like(out[out != 0], 1 / n / (1 - p)).double(),
        torch.full_like(out[out != 0], 1 / n / (1 - p)),
    )


@grid("attention_bitwise", cpu=4, cuda=12, mask=("full", "causal"), layout=("contiguous", "unaligned"))
def test_a_hundred_runs_give_the_same_bits(case):
    q, k, v = (arrange(case.randn(2, s, 4, 64), case.layout) for s in (129, 300, 300))
    first = OPS.attention(q, k, v, **MASKS[case.mask])
    for _ in range(100):
        again = OPS.attention(q, k, v, **MASKS[case.mask])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@grid("attention_layout", cpu=6, cuda=15, layout=LAYOUTS, head_dim=(64, 59))
def test_memory_layout_does_not_change_a_result(case):
    q, k, v = (case.randn(2, s, 4, case.head_dim) for s in (67, 131, 131))
    expected, expected_lse = OPS.attention(q, k, v, causal=True)
    out, lse = OPS.attention(*(arrange(t, case.layout) for t in (q, k, v)), causal=True)
    if case.device == "cpu":
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    else:  # an unaligned tensor may run in another kernel, whose sums have another order
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(out.float(), expected.float(), rtol=2 * torch.finfo(out.dtype).eps, atol=4e-3)


@grid("attention_alone", cpu=8, cuda=12, mask=("full", "causal", "left"), lengths=((1, 147), (40, 83)))
def test_a_batch_entry_alone_gives_the_bits_it_has_in_the_batch(case):
    seqlen_q, seqlen_k = case.lengths
    q, k, v = (case.randn(5, s, h, 64) for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
    out, lse = OPS.attention(q, k, v, **MASKS[case.mask])
    for b in range(5):
        alone, alone_lse = OPS.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **MASKS[case.mask])
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])


@grid("attention_batches", cpu=2, cuda=16, mask=("full", "causal", "left"), head_dim=(64, 96, 128, 192, 256))
def test_a_large_batch_is_accurate_and_has_the_bits_of_each_entry_alone(case):
    """On CUDA many tiles for each multiprocessor, and on Hopper others than a batch of one takes."""
    batch, seqlen = (24, 300) if case.device == "cuda" else (3, 70)
    q, k, v = (case.randn(batch, seqlen, 16, case.head_dim) for _ in range(3))
    out, lse = check(q, k, v, **MASKS[case.mask])
    for b in (0, batch // 2, batch - 1):
        alone, alone_lse = OPS.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **MASKS[case.mask])
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])


@grid(
    "attention_growth",
    cpu=3,
    cuda=30,
    mask=("full", "causal", "left"),
    head_dim=(64, 96, 128, 192, 256),
    lengths=((700, 700), (130, 900)),
)
def test_row_maxima_may_grow_by_far_from_block_to_block(case):
    """Scores whose size changes eightfold along the keys, in either direction: kernels walk them from either end."""
    seqlen_q, seqlen_k = case.lengths
    for first, last in ((8.0, 1.0), (1.0, 8.0)):
        q, k, v = (case.randn(2, s, 4, case.head_dim) for s in (seqlen_q, seqlen_k, seqlen_k))
        growth = torch.linspace(first, last, seqlen_k, device=k.device)[:, None, None]
        check(q * 4, (k * growth).to(k.dtype), v, **MASKS[case.mask])


@grid("attention_rows", cpu=3, cuda=20, mask=("full", "causal", "left"), head_dim=(64, 96, 128, 192, 256))
def test_large_scores_of_a_row_leave_the_bits_of_all_others(case):
    """Rows share tiles, in which a maximum that grew makes a kernel look at a block again."""
    q, k, v = (case.randn(2, s, 4, case.head_dim) for s in (150, 400, 400))
    clean, clean_lse = OPS.attention(q, k, v, **MASKS[case.mask])
    q[:, 40] *= 50
    out, lse = OPS.attention(q, k, v, **MASKS[case.mask])
    assert not torch.equal(out[:, 40], clean[:, 40])
    rest = [i for i in range(150) if i != 40]
    assert torch.equal(out[:, rest], clean[:, rest]) and torch.equal(lse[:, :, rest], clean_lse[:, :, rest])


def test_number_of_threads_does_not_change_the_bits():
    q, k, v = (torch.randn(3, s, 4, 64).bfloat16() for s in (97, 203, 203))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results.append(OPS.attention(q, k, v, causal=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@grid("attention_inputs", cpu=3, cuda=3)
def test_inputs_are_left_as_they_are(case):
    tensors = [case.randn(2, 33, 4, 64) for _ in range(3)]
    before = [t.clone() for t in tensors]
    OPS.attention(*tensors, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_left": 150, "window_right": 40}], ids=["causal", "window"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("family", [0, 80], ids=["auto", "sm80"])
def test_bad_values_reach_no_row_that_does_not_see_them(family, head_dim, mask):
    case = Case(device="cuda", dtype=torch.bfloat16)
    seqlen_q, seqlen_k, column = 700, 1100, 9
    q = case.randn(2, seqlen_q, 4, head_dim)
    k, v = (case.randn(2, seqlen_k, 2, head_dim) for _ in range(2))
    position = torch.arange(seqlen_q, device="cuda") + seqlen_k - seqlen_q
    previous = OPS.force_arch(family)
    try:
        clean, clean_lse = OPS.attention(q, k, v, **mask)
        for key, bad in ((1099, float("nan")), (640, float("inf")), (130, float("nan")), (512, -float("inf"))):
            spoilt = v.clone()
            spoilt[1, key, 1, column] = bad
            sees = key <= position if "causal" in mask else (key <= position + 40) & (key >= position - 150)
            out, lse = OPS.attention(q, k, spoilt, **mask)
            assert torch.equal(lse, clean_lse)
            touched = torch.zeros_like(clean, dtype=torch.bool)
            touched[1, :, 2:, column] = sees[:, None]
            assert torch.equal(out[~touched], clean[~touched]), f"key {key}"
            assert not torch.isfinite(out[touched]).any(), f"key {key}"
    finally:
        OPS.force_arch(previous)


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen", [1, 63, 65, 129, 200, 257, 385, 513, 577, 640, 1025])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_with_few_rows(head_dim, seqlen):
    """Warpgroups without rows, or that see half a block, between tiles that have all: 138 heads on up to 132 blocks."""
    case = Case(device="cuda", dtype=torch.bfloat16)
    q, k, v = (case.randn(3, seqlen, 46, head_dim) for _ in range(3))
    for mask in ({}, {"causal": True}, {"window_left": 70, "window_right": 0}):
        check(q, k, v, **mask)
        check(q[:, : max(seqlen // 3, 1)], k, v, **mask)
        check(q, k[:, : max(seqlen // 2, 1)], v[:, : max(seqlen // 2, 1)], **mask)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_heads", [(70000, 1), (1, 70000)], ids=["batch", "heads"])
def test_batch_and_heads_may_exceed_65535(batch_heads):
    batch, heads = batch_heads
    case = Case(device="cuda", dtype=torch.bfloat16)
    q, k, v = (case.randn(batch, s, heads, 32) for s in (1, 3, 3))
    check(q, k, v)
    q, k, v = (case.randn(batch, s, heads, 32) for s in (17, 3, 3))
    check(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [0, 80, -1], ids=["auto", "sm80", "generic"])
def test_another_stream_is_respected(family):
    case = Case(device="cuda", dtype=torch.bfloat16)
    q, k, v = (case.randn(4, 512, 8, 64) for _ in range(3))
    previous = OPS.force_arch(family)
    try:
        expected = OPS.attention(q, k, v)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = q + 0
            out = OPS.attention(late, k, v)[0]
        stream.synchronize()
    finally:
        OPS.force_arch(previous)
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("family", [80, -1], ids=["sm80", "generic"])
def test_tensors_beyond_two_to_the_31_elements_are_addressed(family):
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    batch, heads, dim = 2, 128, 128
    rows = 2**31 // (heads * dim) + 64  # one batch entry of the storage alone exceeds 2^31 elements
    storage = torch.zeros(batch, rows, heads, dim, dtype=torch.bfloat16, device="cuda")  # 8.6 GiB
    k = storage[:, -40:]
    k.copy_(torch.randn(batch, 40, heads, dim))
    v = storage[:, -80:-40]
    v.copy_(torch.randn(batch, 40, heads, dim))
    q = storage[:, -100:-80]
    q.copy_(torch.randn(batch, 20, heads, dim))
    previous = OPS.force_arch(family)
    try:
        check(q, k, v, causal=True)
    finally:
        OPS.force_arch(previous)
