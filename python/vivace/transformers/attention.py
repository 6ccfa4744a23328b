"""What AttentionInterface calls for an implementation named vivace: decides for each call, and runs it.

On a CUDA device that the kernels support, with float16 or bfloat16 tensors, and on the CPU, the call is one operator.
Everything else goes to torch's attention, with one line in the log that says why.
"""

import functools
import logging

import torch

from vivace import policy
from vivace.transformers import fallback
from vivace.transformers.mask_functions import Pattern
from vivace.transformers.masks import plan_of, plan_of_padding

_CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    strict: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer.

    Args:
        module: the layer; its `is_causal` (default True) holds where the argument is None.
        query: (batch, heads, queries, head_dim).
        key: (batch, heads_kv, keys, head_dim).
        value: (batch, heads_kv, keys, head_dim_v).
        attention_mask: None; what `masks.attention_mask` made; (batch, keys), nonzero for tokens; or 4 dimensions that
            broadcast to (batch, heads, queries, keys), bool (False hides) or added to the scores.
        dropout: of the probabilities.
        scaling: of q . k; None: head_dim ** -0.5.
        sliding_window: keys that a query sees, itself included; counts only where the mask is None.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: (heads,) attention sinks.
        position_bias: broadcastable to (batch, heads, queries, keys), added to the scores.
        strict: an error instead of torch's attention where the kernels cannot run on such tensors.
        kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k for packed tokens; output_attentions and
            head_mask, which need the probabilities: plain torch for that call; cache, continuous batching's.

    Returns:
        (batch, queries, heads, head_dim_v), and the probabilities (batch, heads, queries, keys) or None.
    """
    cache = kwargs.get("cache") if kwargs else None
    if type(cache).__name__ == "PagedAttentionCache":
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    query, key, value = _same_dtype(query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (-1, -1) if sliding_window is None or sliding_window > keys else (sliding_window - 1, sliding_window - 1)

    mask, plan = attention_mask, plan_of(attention_mask)
    if plan is not None and (mask.device != query.device or not plan.fits(query.shape[0], queries, keys)):
        # A model on several devices without hooks that move masks, or one that cuts keys or repeats the batch.
        mask, plan = mask.to(query.device, copy=True), None
    if plan is None and mask is not None:
        mask, plan, causal, window = _read_mask(mask, queries, keys, causal, window, query)
    if position_bias is not None:
        visible = fallback.visible_of(mask, plan, queries, keys, causal, window, query.device)
        mask, plan, causal, window = _biased(position_bias, visible), None, False, (-1, -1)
    call = _Call(query, key, value, mask, plan, causal, window, scaling, softcap, s_aux, dropout, kwargs)

    if kwargs.get("output_attentions") or kwargs.get("head_mask") is not None:
        _say_probabilities(type(module).__name__)
        return call.eager(kwargs.get("head_mask"))
    reason = _why_not_here(query.device, query.dtype, max(query.shape[3], value.shape[3]))
    if reason is not None:
        if strict:
            raise policy.UnavailableError(f"vivace: flash_attention_2 was asked for, but {reason}")
        _say(reason)
        return call.torch(), None
    if call.better_in_torch():
        return call.torch(), None
    return call.ours(), None


class _Call:
    """One call, with the ways to run it."""

    def __init__(self, query, key, value, mask, plan, causal, window, scaling, softcap, sinks, dropout, kwargs):
        self.query, self.key, self.value = query, key, value
        self.mask, self.plan = mask, plan
        self.causal, self.window = causal, window
        self.scaling, self.softcap, self.sinks, self.dropout = scaling, softcap, sinks, dropout
        self.packed = mask is None and plan is None and kwargs.get("cu_seq_lens_q") is not None
        if self.packed:
            self.lengths = [kwargs.get(n) for n in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
            self.packed = all(n is not None for n in self.lengths)
        self.gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)

    def visible(self):
        size = self.query.shape[2], self.key.shape[2]
        if self.packed:
            return _visible_packed(*self.lengths[:2], *size, self.causal, self.window)
        if self.plan is None and self.mask is None and self.window == (-1, -1):
            return None  # causal or full
        return fallback.visible_of(self.mask, self.plan, *size, self.causal, self.window, self.query.device)

    def eager(self, head_mask=None):
        visible = self.visible()
        options = {"scaling": self.scaling, "dropout": self.dropout, "softcap": self.softcap, "sinks": self.sinks}
        return fallback.eager(
            self.query, self.key, self.value, visible, causal=self.causal, head_mask=head_mask, **options
        )

    def torch(self):
        if self.softcap or self.sinks is not None:
            return self.eager()[0]
        visible = self.visible()
        causal = self.causal and visible is None
        options = {"scaling": self.scaling, "dropout": self.dropout}
        return fallback.sdpa(self.query, self.key, self.value, visible, causal=causal, **options)

    def better_in_torch(self):
        """Whether torch has what the kernels lack: a backward with dropout, or through a mask, in linear memory."""
        if self.dropout > 0.0:
            return True
        computed = self.mask is not None or (self.plan is not None and self.plan.pattern is None)
        return self.gradient and computed and self.query.is_cuda and not self.softcap and self.sinks is None

    def ours(self):
        from vivace import ops

        q, k, v = (t.transpose(1, 2) for t in (self.query, self.key, self.value))  # (batch, tokens, heads, head_dim)
        sinks = None if self.sinks is None else self.sinks.float()
        options = {"softmax_scale": self.scaling, "softcap": self.softcap or 0.0, "sinks": sinks}
        plan = self.plan
        if self.packed:
            return self._packed(ops, q, k, v, *self.lengths, causal=self.causal, window_size=self.window, **options)
        if plan is None:
            window = (self.window[0], 0) if self.causal else self.window
            bias = self.mask if self.mask is None or self.mask.dtype in (torch.bool, torch.float32) else None
            bias = self.mask.to(q.dtype) if bias is None and self.mask is not None else bias
            return self._dense(ops, q, k, v, window, bias, **options)
        if plan.pattern is None:
            return self._dense(ops, q, k, v, (-1, -1), plan.visible(), **options)
        window = (plan.pattern.window_left, plan.pattern.window_right)
        if plan.pattern.segments is not None:
            cu_seqlens, longest = plan.sequences()
            return self._packed(ops, q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, **options)
        if plan.keys_end < plan.keys:
            k, v = k[:, : plan.keys_end], v[:, : plan.keys_end]
        if not plan.padded:
            return self._dense(ops, q, k, v, window, None, **options)
        if not self.gradient:
            return ops.attention_with_kvcache(
                q,
                k,
                v,
                cache_seqlens=plan.end_key,
                cache_leftpad=plan.first_key,
                window_size=window,
                causal=window[1] == 0,
                **options,
            )
        return self._unpadded(ops, q, window, **options)

    def _dense(self, ops, q, k, v, window, bias, **options):
        causal = window[1] == 0
        if bias is None and not self.gradient and q.shape[1] * (q.shape[2] // k.shape[2]) <= 16 and q.is_cuda:
            # A step of decoding: the cache operator has a kernel for few queries and many keys.
            return ops.attention_with_kvcache(q, k, v, causal=causal, window_size=window, **options)
        return ops.attention(q, k, v, causal=causal, window_size=window, bias=bias, **options)

    @staticmethod
    def _packed(ops, q, k, v, cu_q, cu_k, longest_q, longest_k, *, window_size, causal=False, **options):
        out = ops.attention_varlen(
            *(t.reshape(-1, *t.shape[2:]) for t in (q, k, v)),
            cu_q.to(torch.int32),
            cu_k.to(torch.int32),
            int(longest_q),
            int(longest_k),
            causal=causal or window_size[1] == 0,
            window_size=window_size,
            **options,
        )
        return out.view(*q.shape[:2], *out.shape[1:])

    def _unpadded(self, ops, q, window, **options):
        """A padded batch with gradients: its tokens are packed, and its padding gives 0."""
        batch, queries = q.shape[:2]
        rows, cu_seqlens, longest = self.plan.key_rows()
        capacity = self.plan.keys
        k, v = (t.reshape(-1, *t.shape[2:]) for t in (self.key.transpose(1, 2), self.value.transpose(1, 2)))
        k, v = k.index_select(0, rows), v.index_select(0, rows)
        causal = window[1] == 0
        if queries == capacity:  # self-attention: the same tokens
            flat = q.reshape(-1, *q.shape[2:])
            packed = ops.attention_varlen(
                flat.index_select(0, rows),
                k,
                v,
                cu_seqlens,
                cu_seqlens,
                longest,
                longest,
                causal=causal,
                window_size=window,
                **options,
            )
            out = packed.new_zeros((batch * queries, *packed.shape[1:])).index_copy(0, rows, packed)
            return out.view(batch, queries, *packed.shape[1:])
        starts = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device)
        packed = ops.attention_varlen(
            q.reshape(-1, *q.shape[2:]),
            k,
            v,
            starts,
            cu_seqlens,
            queries,
            longest,
            causal=causal,
            window_size=window,
            **options,
        )
        return packed.view(batch, queries, *packed.shape[1:])


def _same_dtype(query, key, value):
    """One dtype for all: autocast's for float32 tensors under autocast, else value's (rotary embeddings may leave q
    and k in float32)."""
    if query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    else:
        dtype = value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _read_mask(mask, queries, keys, causal, window, query):
    """A mask that is none of ours, as (mask, plan, causal, window) for the call."""
    if mask.dim() == 2:
        left = window[0]
        pattern = Pattern(left, 0 if causal else window[1])
        return None, plan_of_padding(mask, queries, keys, pattern), causal, window
    if mask.dim() != 4:
        raise ValueError(
            f"vivace: attention_mask has shape {tuple(mask.shape)}, expected (batch, keys) or one that broadcasts to "
            f"(batch, heads, queries, keys) = ({query.shape[0]}, {query.shape[1]}, {queries}, {keys})"
        )
    if mask.shape[3] > keys:
        mask = mask[..., :keys]
    if mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.to(query.dtype)
    return mask, None, False, (-1, -1)


def _biased(bias, visible):
    if visible is None:
        return bias
    if visible.dtype == torch.bool:
        return torch.where(visible, bias, torch.finfo(bias.dtype).min)
    return bias + visible


def _visible_packed(cu_q, cu_k, queries, keys, causal, window):
    """bool (1, 1, queries, keys) for tokens packed into one row."""
    index_q, index_k = (torch.arange(n, device=cu_q.device) for n in (queries, keys))
    row = torch.bucketize(index_q, cu_q[1:-1].to(index_q.dtype), right=True)
    column = torch.bucketize(index_k, cu_k[1:-1].to(index_k.dtype), right=True)
    visible = row[:, None] == column
    # Positions inside a sequence, from its end: bottom-right alignment.
    distance = (index_k - cu_k[1:][column]) - (index_q - cu_q[1:][row])[:, None]
    left, right = window
    if causal:
        right = 0
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    return visible[None, None]


@torch.compiler.assume_constant_result
def _why_not_here(device, dtype, head_dim):
    """As policy.why_not, and the CPU is welcome where the operators load."""
    return _remembered(device, dtype, head_dim)


@functools.lru_cache(maxsize=256)
def _remembered(device, dtype, head_dim):
    if device.type == "cpu":
        if dtype not in _CPU_DTYPES:
            return f"the tensors are {str(dtype).removeprefix('torch.')}"
        if head_dim > policy.MAXIMUM_HEAD_DIM:
            return f"head_dim is {head_dim}, and the operators go up to {policy.MAXIMUM_HEAD_DIM}"
        from vivace import library

        reason = library.unavailable_reason()
        return None if reason is None else f"the operators do not load: {reason}"
    return policy.why_not(device, dtype, head_dim)


def _say(reason):
    if not torch.compiler.is_compiling():
        policy.log_once(logging.WARNING, f"attention runs on torch's scaled_dot_product_attention: {reason}")


def _say_probabilities(layer):
    if not torch.compiler.is_compiling():
        policy.log_once(
            logging.WARNING,
            f"{layer}: the attention probabilities were asked for (output_attentions or head_mask), which flash "
            "kernels do not have: such calls run in plain torch",
        )
