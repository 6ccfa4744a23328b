"""Fake implementations: what the operators return, without data, so that torch.compile and FakeTensor can trace them.

They compute with symbolic sizes only; a C++ Meta kernel would make every length a constant (and a compilation).
"""

import functools

import torch


def register() -> None:
    """Registers them all; the operator library must be loaded."""
    for name, function in _FAKES.items():
        torch.library.register_fake(f"vivace::{name}", _without_mixtures(name, function))


def _without_mixtures(name, function):
    """A call with one tensor on the meta device ends up here, whatever the others hold, and its result would be taken
    for theirs."""
    names = [argument.name for argument in getattr(torch.ops.vivace, name).default._schema.arguments]

    @functools.wraps(function)
    def fake(*args, **kwargs):
        devices = {n: t.device for n, t in (*zip(names, args, strict=False), *kwargs.items()) if torch.is_tensor(t)}
        (first, device), *others = devices.items()
        for other, its in others:
            if (its.type == "meta") != (device.type == "meta"):
                raise RuntimeError(
                    f"vivace.{name}: {other} is on {its}, {first} is on {device}; all tensors must be on one device"
                )
        return function(*args, **kwargs)

    return fake


def _attention(q, k, v, *args, **kwargs):
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v.shape[-1]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _attention_varlen(q, k, v, *args, **kwargs):
    total_q, heads, _ = q.shape
    out = q.new_empty((total_q, heads, v.shape[-1]))
    return out, q.new_empty((heads, total_q), dtype=torch.float32)


def _attention_with_kvcache(q, k_cache, v_cache, *args, **kwargs):
    return _attention_varlen(q, k_cache, v_cache) if q.dim() == 3 else _attention(q, k_cache, v_cache)


def _attention_backward(dout, q, k, v, *args, **kwargs):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _like_x(x, *args, **kwargs):
    return x.new_empty(x.shape)


def _in_place(x, *args, **kwargs):
    return None


def _silu_gate(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _sample(logits, rows, *args, **kwargs):
    return logits.new_empty((rows.shape[0],), dtype=torch.int64)


def _sampling_probs(logits, rows, *args, **kwargs):
    return logits.new_empty((rows.shape[0], logits.shape[1]), dtype=torch.float32)


def _decode_step(
    tokens,
    positions,
    row_request,
    speech_emb,
    speech_pos_emb,
    input_norm,
    qkv,
    out,
    post_norm,
    gate_up,
    down,
    norm,
    head,
    *args,
    **kwargs,
):
    return head.new_empty((row_request.shape[0], head.shape[0]), dtype=torch.float32)


_FAKES = {
    "attention": _attention,
    "attention_varlen": _attention_varlen,
    "attention_with_kvcache": _attention_with_kvcache,
    "attention_backward": _attention_backward,
    "attention_varlen_backward": _attention_backward,
    "rms_norm": _like_x,
    "add_rms_norm": _like_x,
    "rotary_embedding": _like_x,
    "rotary_embedding_": _in_place,
    "silu_gate": _silu_gate,
    "decode_step": _decode_step,
    "sample": _sample,
    "sample_advance": _in_place,
    "sampling_probs": _sampling_probs,
}
