"""The mask that we make says what transformers' own says, however it is read."""

import models
import pytest
import torch

pytestmark = pytest.mark.skipif(models.VERSION < (4, 53), reason="transformers before 4.53 makes masks itself")
if models.VERSION >= (4, 53):
    from transformers import masking_utils

    from vivace.transformers.mask_functions import Pattern, recognise
    from vivace.transformers.masks import AttentionMask, attention_mask, plan_of, plan_of_padding


def arguments(queries, keys, first, offset=0, **options):
    """What create_causal_mask and its siblings pass on, in this version."""
    if models.VERSION >= (5, 3):
        where = {"q_length": queries, "q_offset": first, "device": "cpu"}
    else:
        where = {"cache_position": torch.arange(first, first + queries)}
    return {"batch_size": 3, "kv_length": keys, "kv_offset": offset, **where, **options}


def visible_to(plan, batch):
    """bool (batch, 1, queries, keys): what the kernels are told, element by element."""
    seen = torch.zeros(batch, 1, plan.queries, plan.keys, dtype=torch.bool)
    for b in range(batch):
        first = 0 if plan.first_key is None else int(plan.first_key[b])
        end = plan.keys_end if plan.end_key is None else int(plan.end_key[b])
        for i in range(plan.queries):
            position = end - plan.queries + i
            for j in range(first, end):
                left, right = plan.pattern.window_left, plan.pattern.window_right
                near = (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
                segments = plan.pattern.segments
                seen[b, 0, i, j] = near and (segments is None or segments[b, i] == segments[b, j])
    return seen


def paddings(keys):
    left, right, holes = (torch.ones(3, keys, dtype=torch.bool) for _ in range(3))
    left[1, :2], left[2, :4] = False, False
    right[0, -1:], right[2, -3:] = False, False
    holes[1, 3], holes[2, 0] = False, False
    return {"none": None, "whole": torch.ones(3, keys, dtype=torch.bool), "left": left, "right": right, "holes": holes}


@pytest.mark.parametrize("padding", ["none", "whole", "left", "right", "holes"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(
    ("queries", "keys", "first", "offset"),
    [(9, 9, 0, 0), (4, 9, 5, 0), (1, 9, 8, 0), (5, 12, 0, 0), (1, 12, 5, 0), (3, 12, 4, 0), (2, 6, 10, 6)],
)
def test_a_causal_mask_says_what_sdpa_would_be_told(queries, keys, first, offset, window, padding):
    function = masking_utils.causal_mask_function
    options = {}
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
        options["local_size"] = window
    mask2d = paddings(first + queries)[padding]
    given = arguments(queries, keys, first, offset, mask_function=function, attention_mask=mask2d, **options)
    truth = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    made = attention_mask(**given, dtype=torch.float32)
    real = torch.ones(3, queries, dtype=torch.bool) if mask2d is None else mask2d[:, first : first + queries]
    if made is None:  # plain causal, aligned at the end
        told = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(3, 1, queries, keys)
        assert torch.equal(told.transpose(1, 2)[real], truth.expand(3, 1, -1, -1).transpose(1, 2)[real])
        return
    assert made.shape == (3, 1, queries, keys)
    plan = plan_of(made)
    if plan.pattern is not None:
        told = visible_to(plan, 3)
        assert torch.equal(told.transpose(1, 2)[real], truth.expand(3, 1, -1, -1).transpose(1, 2)[real])
    else:
        assert padding in ("holes", "right", "left")
    additive = torch.where(truth, 0.0, torch.finfo(torch.float32).min).expand(3, 1, queries, keys)
    assert torch.equal(made + torch.zeros(()), additive)  # and to others it is eager's mask
    assert torch.equal(made[:, :, :, : keys - 1].clone(), additive[..., : keys - 1])


@pytest.mark.parametrize("padding", ["whole", "left", "right", "holes"])
def test_a_full_mask_says_what_sdpa_would_be_told(padding):
    if not hasattr(masking_utils, "bidirectional_mask_function"):
        pytest.skip("this version has no bidirectional masks")
    mask2d = paddings(9)[padding]
    function = masking_utils.bidirectional_mask_function
    given = arguments(7, 9, 0, mask_function=function, attention_mask=mask2d)
    truth = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False).expand(3, 1, 7, 9)
    made = attention_mask(**given)
    if padding == "whole":
        assert made is None
    elif padding == "holes":
        assert plan_of(made).pattern is None
    else:
        assert torch.equal(visible_to(plan_of(made), 3), truth)
    if made is not None:
        assert torch.equal(made == 0, truth)


def test_packed_sequences_become_lengths():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4]])
    function = masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(2), masking_utils.packed_sequence_mask_function(segments)
    )
    assert recognise(function) == Pattern(1, 0, segments)
    given = arguments(6, 6, 0, mask_function=function)
    made = attention_mask(**given, allow_is_causal_skip=False)
    truth = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    assert torch.equal(visible_to(plan_of(made), 3), truth)
    cu_seqlens, longest = plan_of(made).sequences()
    assert cu_seqlens.tolist() == [0, 2, 5, 6, 12, 13, 14, 15, 16, 18] and longest == 6


def test_what_is_not_known_is_computed():
    def custom(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx - q_idx) % 3 != 1

    chunks = masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int64))
    both = masking_utils.or_masks(masking_utils.causal_mask_function, custom)
    for function in (custom, chunks, both):
        assert recognise(function) is None
        given = arguments(8, 8, 0, mask_function=function)
        made = attention_mask(**given)
        assert isinstance(made, AttentionMask) and plan_of(made).pattern is None
        assert torch.equal(plan_of(made).visible(), masking_utils.sdpa_mask(**given, allow_is_causal_skip=False))


def test_a_mask_of_two_dimensions_is_a_plan_too():
    mask2d = paddings(9)["left"]
    plan = plan_of_padding(mask2d.long(), 4, 9, Pattern(2, 0))
    truth = masking_utils.sdpa_mask(
        **arguments(4, 9, 5, mask_function=masking_utils.sliding_window_causal_mask_function(3), attention_mask=mask2d),
        allow_is_causal_skip=False,
    )
    assert torch.equal(plan.visible(), truth) and torch.equal(visible_to(plan, 3), truth)


def test_our_mask_may_be_moved_cast_and_copied():
    mask2d = paddings(9)["left"]
    made = attention_mask(**arguments(9, 9, 0, attention_mask=mask2d))
    assert isinstance(made, AttentionMask)
    plain = made.clone()
    assert type(plain) is torch.Tensor
    for other in (made.to(torch.float64), made.detach(), made[:, :, 2:], made.expand(3, 4, 9, 9), made * 1.0):
        assert type(other) is torch.Tensor
    assert torch.equal(made.to(torch.float64).float(), plain) and "AttentionMask" in repr(made)
