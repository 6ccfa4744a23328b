"""Our kernels inside torch's scaled_dot_product_attention, through torch's own registry (torch 2.11 and newer):

    import vivace.ops                                                  # makes the name known
    torch.nn.attention.activate_flash_attention_impl("vivace")
    torch.nn.attention.restore_flash_attention_impl()

Where torch would run its flash attention (CUDA, float16 or bfloat16, no mask) it then runs ours: in eager code, in
compiled and in exported programs. Gradients are torch's flash backward on our output and log-sum-exp. Dropout, debug
masks and ALiBi stay with torch's kernels.
"""

import warnings

import torch

from vivace.torch_backward import flash_lse, last_contiguous

NAME = "vivace"

_originals: dict[str, object] = {}


def register() -> bool:
    """Makes the name known to torch's registry; activates nothing. Returns whether this torch has the registry."""
    from torch.nn import attention

    if not hasattr(attention, "restore_flash_attention_impl") or not hasattr(torch.library, "get_kernel"):
        return False
    attention.register_flash_attention_impl(NAME, register_fn=_activate)
    return True


class _Handle:
    """What the registry keeps while we are active."""

    def __init__(self, library):
        self._library = library

    def remove(self) -> None:
        """Gives torch's kernels their place back."""
        library, self._library = self._library, None
        if library is not None:
            library._destroy()


def _activate() -> _Handle:
    from vivace import policy

    if torch.cuda.is_available():
        reason = policy.why_not()
        if reason is not None:
            raise policy.UnavailableError(f"vivace: our kernels cannot take the place of torch's: {reason}")
    functions = {
        "_scaled_dot_product_flash_attention": _scaled_dot_product_flash_attention,
        "_flash_attention_forward": _flash_attention_forward,
    }
    for name in functions:
        if name not in _originals:
            _originals[name] = torch.library.get_kernel(f"aten::{name}", "CUDA")
    library = torch.library.Library("aten", "IMPL", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "overriding a previously registered kernel": yes
        for name, function in functions.items():
            library.impl(name, function, "CUDA", with_keyset=True)
    return _Handle(library)


def _scaled_dot_product_flash_attention(
    keyset, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    """q, k, v (batch, heads, tokens, head_dim); nine results, as aten's schema has them."""
    if not _ours(query, key, value, dropout_p, return_debug_mask):
        return _originals["_scaled_dot_product_flash_attention"].call_boxed(
            keyset, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
        )
    q, k, v = (last_contiguous(t.transpose(1, 2)) for t in (query, key, value))
    out, lse = torch.ops.vivace.attention(q, k, v, scale, is_causal)
    if query.requires_grad and is_causal and q.shape[1] > k.shape[1]:
        lse = flash_lse(lse)
    return _like(out.transpose(1, 2), query), lse, None, None, q.shape[1], k.shape[1], *_unused(query)


def _flash_attention_forward(
    keyset,
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
):
    """q, k, v (batch, tokens, heads, head_dim), or packed (total, heads, head_dim) with cum_seq; five results."""
    dense = cum_seq_q is None
    covered = _ours(query, key, value, dropout_p, return_debug_mask) and alibi_slopes is None
    if not covered or (dense and seqused_k is not None) or dense != (cum_seq_k is None):
        options = {"scale": scale, "window_size_left": window_size_left, "window_size_right": window_size_right}
        return _originals["_flash_attention_forward"].call_boxed(
            keyset,
            query,
            key,
            value,
            cum_seq_q,
            cum_seq_k,
            max_q,
            max_k,
            dropout_p,
            is_causal,
            return_debug_mask,
            **options,
            seqused_k=seqused_k,
            alibi_slopes=alibi_slopes,
        )
    left, right = (-1 if side is None else side for side in (window_size_left, window_size_right))
    q, k, v = map(last_contiguous, (query, key, value))
    if dense:
        out, lse = torch.ops.vivace.attention(q, k, v, scale, is_causal, left, right)
    else:
        cu_q, cu_k = cum_seq_q.to(torch.int32), cum_seq_k.to(torch.int32)
        out, lse = torch.ops.vivace.attention_varlen(
            q, k, v, cu_q, cu_k, max_q, max_k, None, seqused_k, None, scale, is_causal, left, right
        )
    if query.requires_grad:
        lse = flash_lse(lse)
    return _like(out, query), lse, *_unused(query)


def _ours(query, key, value, dropout_p, return_debug_mask):
    return (
        dropout_p == 0.0
        and not return_debug_mask
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and not (query.is_nested or key.is_nested or value.is_nested)
    )


def _like(out, query):
    """out in the memory layout of query, which compiled programs count on."""
    if out.shape != query.shape or out.stride() == query.stride():
        return out
    return torch.empty_like(query).copy_(out)


def _unused(query):
    """Dropout's seed and offset, and the debug mask: nothing reads them without dropout."""
    seed = torch.empty((2,), dtype=torch.uint64, device=query.device)
    offset = torch.empty((), dtype=torch.uint64, device=query.device)
    return seed, offset, query.new_empty(0)
