"""What a mask function of transformers says, read from its code instead of from a matrix of its values.

transformers.masking_utils builds masks from small closures, and_masks(sliding_window_overlay(4096),
causal_mask_function) say. The kernels know these patterns by name. What is not recognised, with certainty, is None:
the mask is then computed.
"""

import functools
from typing import NamedTuple

import torch


class Pattern(NamedTuple):
    """Which keys a query sees, by index. Query and key indices count from the start of the sequence."""

    window_left: int = -1  # keys before the query's own that it sees; -1: all
    window_right: int = -1  # keys after it; 0 is causal
    segments: torch.Tensor | None = None  # (batch, tokens), the packed sequence that each token belongs to

    def and_also(self, other: "Pattern") -> "Pattern | None":
        """What both show; None where that is no Pattern."""
        if self.segments is not None and other.segments is not None:
            return None
        return Pattern(
            _tighter(self.window_left, other.window_left),
            _tighter(self.window_right, other.window_right),
            self.segments if other.segments is None else other.segments,
        )


def _tighter(a, b):
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def recognise(mask_function) -> Pattern | None:
    """The pattern of a mask function that transformers.masking_utils made, or None."""
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return Pattern(window_right=0)
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Pattern()
    code = getattr(mask_function, "__code__", None)
    kind = _known_closures().get(code)
    if kind is None:
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in mask_function.__closure__ or ()), strict=True))
    return kind(**cells)


def _and(mask_functions):
    whole = Pattern()
    for function in mask_functions:
        part = recognise(function)
        whole = None if part is None else whole.and_also(part)
        if whole is None:
            return None
    return whole


def _sliding(sliding_window):
    # kv_idx > q_idx - sliding_window
    return Pattern(window_left=sliding_window - 1) if isinstance(sliding_window, int) and sliding_window > 0 else None


def _sliding_both_sides(sliding_window):
    # |q_idx - kv_idx| <= sliding_window
    return Pattern(sliding_window, sliding_window) if isinstance(sliding_window, int) and sliding_window >= 0 else None


def _packed(packed_sequence_mask):
    return Pattern(segments=packed_sequence_mask)


def _remapped(mask_function, position_ids):
    # Positions inside a packed sequence instead of indices: they differ by a constant there, and only differences
    # count.
    return recognise(mask_function)


@functools.lru_cache(maxsize=1)
def _known_closures():
    """Code object of each closure that is known -> what makes a Pattern of its captured variables."""
    from transformers import masking_utils

    makers = {
        "and_masks": (_and, (masking_utils.causal_mask_function,)),
        "sliding_window_overlay": (_sliding, (1,)),
        "sliding_window_bidirectional_overlay": (_sliding_both_sides, (1,)),
        "packed_sequence_mask_function": (_packed, (None,)),
        "remap_positions_for_packed_sequence": (_remapped, (None, None)),
    }
    expected = {
        "and_masks": ("mask_functions",),
        "sliding_window_overlay": ("sliding_window",),
        "sliding_window_bidirectional_overlay": ("sliding_window",),
        "packed_sequence_mask_function": ("packed_sequence_mask",),
        "remap_positions_for_packed_sequence": ("mask_function", "position_ids"),
    }
    known = {}
    for name, (kind, arguments) in makers.items():
        maker = getattr(masking_utils, name, None)
        code = None if maker is None else maker(*arguments).__code__
        if code is not None and set(code.co_freevars) == set(expected[name]):
            known[code] = kind
    return known
