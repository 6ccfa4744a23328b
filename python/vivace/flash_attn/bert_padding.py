"""flash-attn's helpers that take the padding out of a batch and put it back."""

import torch
import torch.nn.functional as F


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x[indices] along the first dimension: (rows, ...) and int64 (selected,) -> (selected, ...). Differentiable."""
    return x.index_select(0, indices)


def index_first_axis_residual(x: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x[indices], x), both differentiable: what is taken out, and all of it for a residual connection."""
    return x.index_select(0, indices), x.view_as(x)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros (first_axis_dim, ...) with values (selected, ...) at rows indices. Differentiable."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Takes a padded batch apart.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: bool or int (batch, seqlen), nonzero for tokens.
        unused_mask: the same shape, nonzero for places that are allotted but hold no token.

    Returns:
        (total, ...) of the allotted rows; int64 (total,), their places in (batch * seqlen); int32 (batch + 1,), where
        each sequence starts; the longest allotted length; int32 (batch,), the tokens of each sequence.
    """
    allotted = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = allotted.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = allotted.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()),
        used,
    )


def pad_input(hidden_states, indices, batch, seqlen):
    """Puts rows (total, ...) back into (batch, seqlen, ...), zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """`unpad_input` for rows that hold several sequences one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: int (batch, seqlen), the lengths of a row's sequences, then zeros: [2, 3, 0, 0, 0, 0]
            says that the row starts with a sequence of 2 and one of 3.

    Returns:
        (total, ...); int64 (total,); int32 (sequences + 1,); the longest length.
    """
    seqlen = attention_mask_in_length.shape[-1]
    tokens = attention_mask_in_length.sum(dim=-1)
    places = torch.arange(seqlen, device=tokens.device)
    indices = (places < tokens[:, None]).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0].to(torch.int32)
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()),
    )
