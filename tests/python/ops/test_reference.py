"""The reference itself, held against published vectors, torch and transformers: a judge must be judged too."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from reference.attention import attention
from reference.philox import dropout_keep, philox4x32_10, sampling_uniforms
from reference.rotary import rotary_embedding
from reference.sampling import distribution, draw


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert tuple(int(word) for word in philox4x32_10(counter, key)) == expected


def test_sampling_uniforms_lie_in_the_half_open_unit_interval_and_differ_by_seed_and_step():
    u = sampling_uniforms(7, 3, 4099)
    assert u.min() > 0 and u.max() <= 1 and abs(u.mean() - 0.5) < 0.02
    assert not np.array_equal(u, sampling_uniforms(7, 4, 4099))
    assert not np.array_equal(u, sampling_uniforms(-7, 3, 4099))
    assert np.array_equal(u[:100], sampling_uniforms(7, 3, 100))


def test_dropout_keeps_the_same_elements_whatever_the_shape_around_them():
    whole = dropout_keep(11, 5, [0, 3], 40, 70, 0.3)
    assert np.array_equal(whole[1:, :21, :33], dropout_keep(11, 5, [3], 21, 33, 0.3))
    assert abs(whole.mean() - (np.floor(0.7 * 255) + 1) / 256) < 0.02


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 4), (6, 2), (5, 1)])
def test_attention_equals_torch_in_float64(causal, heads, heads_kv):
    q = torch.randn(2, 31, heads, 24, dtype=torch.float64)
    k, v = (torch.randn(2, 45, heads_kv, d, dtype=torch.float64) for d in (24, 17))
    out, lse = attention(q, k, v, causal=causal)
    mask = torch.ones(31, 45, dtype=torch.bool).tril(45 - 31) if causal else None
    wide = [t.transpose(1, 2) for t in (q, k, v)]
    expected = scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    s = wide[0] @ wide[1].repeat_interleave(heads // heads_kv, 1).mT / 24**0.5
    if causal:
        s = s.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, torch.logsumexp(s, dim=-1))


def test_attention_with_bias_and_sinks_equals_a_softmax_with_one_more_column():
    q, k, v = (torch.randn(2, 9, 3, 8, dtype=torch.float64) for _ in range(3))
    bias, sinks = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.randn(3)
    out, lse = attention(q, k, v, bias=bias, sinks=sinks)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5 + bias
    s = torch.cat([s, sinks.double()[None, :, None, None].expand(2, 3, 9, 1)], dim=-1)
    expected = torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., :-1], v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, s.logsumexp(-1))


def test_rotary_turns_pairs_as_complex_numbers_do():
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    angle = torch.rand(9, 4, dtype=torch.float64) * 6
    positions = torch.tensor([8, 0, 3, 3, 1])
    turn = torch.polar(torch.ones(5, 1, 4, dtype=torch.float64), angle[positions][:, None])
    for interleaved in (False, True):
        pairs = x[..., :8].unflatten(-1, (4, 2)) if interleaved else x[..., :8].unflatten(-1, (2, 4)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        turned = (turned if interleaved else turned.mT).flatten(-2)
        expected = torch.cat([turned, x[..., 8:]], dim=-1)
        torch.testing.assert_close(rotary_embedding(x, angle.cos(), angle.sin(), positions, interleaved), expected)


def test_sampling_equals_the_logits_processors_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    for trial in range(20):
        logits, uncond = torch.randn(2, 501).double() * 3
        seen = torch.rand(501) < 0.2
        temperature, penalty, min_p, top_p = 0.8, 1.2 + 0.1 * trial, 0.02 * trial, 1.0 - 0.03 * trial
        top_k = 0 if trial % 2 else 40
        ids = seen.nonzero().T
        x = (logits + 0.5 * (logits - uncond))[None]
        x = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, x) / temperature
        if top_k:
            x = processors.TopKLogitsWarper(top_k)(ids, x)
        x = processors.MinPLogitsWarper(min_p)(ids, x)
        x = processors.TopPLogitsWarper(top_p)(ids, x)
        ours = distribution(
            logits.numpy(), uncond.numpy(), seen.numpy(), 0.5, temperature, penalty, min_p, top_p, top_k
        )
        np.testing.assert_allclose(ours.probs, x[0].softmax(-1).numpy(), rtol=1e-9, atol=1e-15)


def test_the_exponential_race_draws_from_its_distribution():
    probs = np.array([0.5, 0.25, 0.0, 0.2, 0.05])
    counts = np.bincount([draw(probs, 3, step).token for step in range(4000)], minlength=5)
    assert counts[2] == 0
    expected = 4000 * probs[probs > 0]
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
