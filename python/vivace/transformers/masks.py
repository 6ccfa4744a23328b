"""The mask that transformers makes for an implementation named vivace: a plan of what each query sees, not a matrix.

`attention_mask` is what AttentionMaskInterface calls. It returns None where attention is plainly causal or full, and
else an AttentionMask: to every other reader a float tensor (batch, 1, queries, keys) of 0 and the dtype's minimum, as
eager attention takes it, computed when something looks at it; to our attention a MaskPlan.
"""

import torch
from torch.utils._pytree import tree_map

from vivace.transformers.mask_functions import Pattern, recognise


class MaskPlan:
    """What each query sees, for the kernels.

    Query i stands at key keys_end - queries + i, where keys_end is the number of keys that count (a static cache holds
    more); it sees keys by the window around that position, between first_key and end_key of its row of the batch.
    Where `pattern` is None only `visible()` says what is seen.
    """

    def __init__(self, batch, queries, keys, make_visible):
        self.batch, self.queries, self.keys = batch, queries, keys
        self.pattern: Pattern | None = None
        self.keys_end: int = keys
        self.first_key: torch.Tensor | None = None  # int32 (batch,)
        self.end_key: torch.Tensor | None = None  # int32 (batch,): the keys end there, and the last query stands last
        self._make_visible = make_visible
        self._visible = None
        self._additive = {}
        self._sequences = None
        self._rows = None

    @property
    def padded(self) -> bool:
        return self.first_key is not None or self.end_key is not None

    def fits(self, batch: int, queries: int, keys: int) -> bool:
        """Whether it was made for a call of these sizes."""
        return self.queries == queries and self.keys == keys and self.batch == batch

    def visible(self) -> torch.Tensor:
        """bool (batch or 1, 1, queries, keys)."""
        if self._visible is None:
            self._visible = self._make_visible()
        return self._visible

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where visible, dtype's minimum elsewhere."""
        if dtype not in self._additive:
            visible = self.visible()
            zero = torch.zeros((), dtype=dtype, device=visible.device)
            self._additive[dtype] = torch.where(visible, zero, torch.finfo(dtype).min)
        return self._additive[dtype]

    def sequences(self) -> tuple[torch.Tensor, int]:
        """cu_seqlens int32 (sequences + 1,) of a packed batch laid out as (batch * tokens), and the longest length."""
        if self._sequences is None:
            segments = self.pattern.segments
            starts = torch.ones_like(segments, dtype=torch.bool)  # each row of the batch starts a sequence
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            starts = starts.flatten().nonzero().flatten().to(torch.int32)
            ends = torch.tensor([segments.numel()], dtype=torch.int32, device=segments.device)
            cu_seqlens = torch.cat((starts, ends))
            self._sequences = cu_seqlens, int(cu_seqlens.diff().max())
        return self._sequences

    def key_rows(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The keys that count of a padded batch: their rows in (batch * keys), cu_seqlens, and the longest length."""
        if self._rows is None:
            index = torch.arange(self.keys, device=(self.end_key if self.first_key is None else self.first_key).device)
            counts = (index < self.keys_end).expand(self.batch, -1)
            if self.first_key is not None:
                counts = counts & (index >= self.first_key[:, None])
            if self.end_key is not None:
                counts = counts & (index < self.end_key[:, None])
            lengths = counts.sum(dim=1, dtype=torch.int32)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            self._rows = counts.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max())
        return self._rows


class AttentionMask(torch.Tensor):
    """A mask of (batch, 1, queries, keys) that is a plan, and becomes a tensor when an operation other than our
    attention reads it."""

    plan: MaskPlan

    @staticmethod
    def __new__(cls, plan: MaskPlan, dtype: torch.dtype, device: torch.device):
        shape = (plan.batch, 1, plan.queries, plan.keys)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.plan = plan
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda t: t.computed() if isinstance(t, cls) else t, (args, kwargs or {}))
        return function(*args, **kwargs)

    def computed(self) -> torch.Tensor:
        """The tensor: 0 where visible, the dtype's minimum elsewhere."""
        return self.plan.additive(self.dtype).expand(self.shape)

    def __repr__(self, *, tensor_contents=None):
        return f"AttentionMask({tuple(self.shape)}, {self.plan.pattern})"


def attention_mask(
    batch_size,
    cache_position=None,
    kv_length=None,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    dtype=torch.float32,
    **kwargs,
):
    """AttentionMaskInterface's entry, of transformers 4.53 to 5.2 (cache_position) and newer (q_length, q_offset).

    Args:
        cache_position: (queries,) indices of the queries, or None with q_length (int) and q_offset (int or 0-d tensor).
        kv_length: number of keys.
        kv_offset: index of the first key.
        mask_function: as transformers.masking_utils makes it.
        attention_mask: bool (batch, tokens so far), False for padding; or None.
        dtype: of the mask where it is computed.
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    where = {k: kwargs[k] for k in ("q_length", "q_offset", "device") if k in kwargs}
    if cache_position is not None:
        where = {"cache_position": cache_position}
    common = {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **where,
        **({"use_vmap": kwargs["use_vmap"]} if "use_vmap" in kwargs else {}),
    }
    queries = where["q_length"] if cache_position is None else cache_position.shape[0]
    device = cache_position.device if cache_position is not None else torch.device(where.get("device", "cpu"))
    pattern = recognise(mask_function)
    if _tracing():
        plain = pattern is not None and pattern.segments is None and pattern.window_left < 0
        if plain and attention_mask is None and (queries == kv_length or pattern.window_right < 0):
            return None
        visible = _computed_by_transformers(common)
        return MaskPlan(batch_size, queries, kv_length, lambda: visible).additive(dtype)

    if pattern is None:  # at once: what it captures may change, and vmap does not work inside of an operation
        visible = _computed_by_transformers(common)
        plan = MaskPlan(batch_size, queries, kv_length, lambda: visible)
    else:
        first = cache_position[0] if cache_position is not None else where.get("q_offset", 0)
        first = first - kv_offset  # among the keys that there are
        padding = None if attention_mask is None else _padding(attention_mask, kv_length, kv_offset)
        plan = MaskPlan(
            batch_size, queries, kv_length, lambda: _visible(pattern, queries, kv_length, first, padding, device)
        )
        needed = _plan(plan, pattern, first, padding)
        if not needed and (queries > 1 or kwargs.get("allow_is_causal_skip", True)):
            return None
    if queries == 1 and not kwargs.get("allow_is_causal_skip", True):
        # A decode step that may be compiled, with this mask as an input: a real tensor, with the plan beside it.
        mask = plan.additive(dtype).expand(batch_size, 1, 1, kv_length).contiguous()
        mask.vivace_plan = plan
        return mask
    return AttentionMask(plan, dtype, device)


def plan_of(mask: torch.Tensor | None) -> MaskPlan | None:
    """The plan that a mask carries, or None."""
    if isinstance(mask, AttentionMask):
        return mask.plan
    return None if mask is None or torch.compiler.is_compiling() else getattr(mask, "vivace_plan", None)


def plan_of_padding(padding: torch.Tensor, queries: int, keys: int, pattern: Pattern) -> MaskPlan | None:
    """The plan for a mask (batch, tokens), nonzero where there is a token, whose queries are the last of the tokens."""
    padding, first = _padding(padding.bool(), keys, 0), keys - queries
    plan = MaskPlan(
        padding.shape[0], queries, keys, lambda: _visible(pattern, queries, keys, first, padding, padding.device)
    )
    return plan if _plan(plan, pattern, first, padding) else None


def _computed_by_transformers(arguments):
    from transformers import masking_utils

    return masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)


def _visible(pattern, queries, keys, first_query, padding, device):
    """bool (batch or 1, 1, queries, keys) of a pattern; first_query: the first query's place among the keys."""
    query = torch.arange(queries, device=device)[:, None] + first_query
    distance = torch.arange(keys, device=device) - query
    visible = torch.ones_like(distance, dtype=torch.bool)
    if pattern.window_left >= 0:
        visible &= distance >= -pattern.window_left
    if pattern.window_right >= 0:
        visible &= distance <= pattern.window_right
    visible = visible[None, None]
    if pattern.segments is not None:
        visible = visible & (pattern.segments[:, None, :, None] == pattern.segments[:, None, None, :])
    return visible if padding is None else visible & padding[:, None, None, :]


def _tracing():
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _capturing(tensor):
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _padding(attention_mask, keys, offset):
    """(batch, keys): attention_mask for the keys that there are; what it does not reach is hidden."""
    missing = offset + keys - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, offset : offset + keys]


def _plan(plan, pattern, first_query, padding):
    """Fills the plan in, or leaves it as visible() alone. Returns whether it says more than causal or full attention
    does.

    first_query: the first query's place among the keys, int or 0-d tensor. Reads the device at most once.
    """
    queries, keys = plan.queries, plan.keys
    causal = pattern.window_right == 0
    if pattern.segments is not None:
        if padding is None and queries == keys and causal and not _capturing(pattern.segments):
            plan.pattern = pattern
        return True

    on_device = isinstance(first_query, torch.Tensor)
    if on_device and queries == keys and causal:
        first_query, on_device = 0, False  # no query stands past the last key
    if not causal and pattern.window_left < 0 and pattern.window_right < 0:
        first_query, on_device = 0, False  # positions play no part
    if on_device and queries == 1 and padding is None and causal:
        # A decode step over a cache: the kernels read the length where it is.
        plan.pattern = pattern
        plan.end_key = (first_query + 1).to(torch.int32).expand(plan.batch).contiguous()
        return True
    if (on_device and _capturing(first_query)) or (padding is not None and _capturing(padding)):
        return True
    start, rows = _read(first_query, on_device, padding, queries, keys, causal)
    end = start + queries if causal else keys
    if end > keys or (causal and start < 0):
        return True
    whole = padding is None or rows["whole"]
    left_window = pattern.window_left
    if left_window >= 0 and left_window >= end - 1:
        left_window = -1  # wider than the keys
    right_window = pattern.window_right
    if right_window > 0 and right_window >= queries - 1 and left_window < 0:
        right_window = -1
    pattern = Pattern(left_window, right_window)
    windowed = left_window >= 0 or right_window > 0

    if not whole and causal and rows["from_start"] and start == 0:
        whole = True  # padding on the right, after every query that counts
    if whole:
        if causal or not windowed or queries == keys:
            plan.pattern, plan.keys_end = pattern, end
        return end < keys or windowed
    elif causal and rows["to_end"]:
        plan.pattern, plan.keys_end, plan.first_key = pattern, end, rows["first"]
    elif rows["contiguous"] and not windowed and (not causal or queries == 1):
        plan.pattern = Pattern()
        plan.first_key = None if rows["from_start"] else rows["first"]
        plan.end_key = rows.get("end")  # missing where all rows go to the end
    return True


def _read(first_query, on_device, padding, queries, keys, causal):
    """The first query's place and what the padding of the keys that count looks like, in one transfer, or two where
    tokens end before those keys do."""
    if padding is None:
        return int(first_query), None
    if causal and on_device:
        end = first_query + queries
        padding = padding & (torch.arange(keys, device=padding.device) < end)  # later keys are hidden anyway
    else:
        end = first_query + queries if causal else keys
        padding = padding[:, :end] if end < keys else padding
    bits = padding.to(torch.uint8)
    first, count = bits.argmax(dim=1), bits.sum(dim=1)
    facts = [first, count, first_query.reshape(1).to(first)] if on_device else [first, count]
    values = torch.cat(facts).tolist()
    if on_device:
        first_query = values.pop()
        end = first_query + queries if causal else keys
    rows = len(values) // 2
    firsts, counts = values[:rows], values[rows:]
    firsts = [f if c else end for f, c in zip(firsts, counts, strict=True)]
    to_end = all(f + c == end for f, c in zip(firsts, counts, strict=True))
    from_start = all(f == 0 for f in firsts)
    result = {"whole": to_end and from_start, "to_end": to_end, "from_start": from_start, "contiguous": to_end}
    if to_end and not from_start:
        result["first"] = torch.tensor(firsts, dtype=torch.int32, device=padding.device)
    elif not to_end:
        last = padding.shape[1] - bits.flip(1).argmax(dim=1)
        ends = [e if c else end for e, c in zip(last.tolist(), counts, strict=True)]
        result["contiguous"] = all(f + c == e for f, c, e in zip(firsts, counts, ends, strict=True))
        result["from_start"] = from_start and result["contiguous"]
        result["first"] = torch.tensor(firsts, dtype=torch.int32, device=padding.device)
        result["end"] = torch.tensor(ends, dtype=torch.int32, device=padding.device)
    return int(first_query), result
