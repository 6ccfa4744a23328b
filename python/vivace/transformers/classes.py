"""Models whose attention is a class for each implementation, without an AttentionInterface: all of transformers 4.46,
some of 4.57 and 5.

Such a model is built as an sdpa model, so that its masks are right, and then each of its sdpa attention layers becomes
a subclass with the same forward, compiled code and all, in which scaled_dot_product_attention is ours.
"""

import sys
import threading
import types
import weakref

import torch
import torch.nn.functional as F

from vivace.transformers.attention import attention

_SDPA = "scaled_dot_product_attention"
_lock = threading.RLock()
_subclasses: dict[type, type | None] = {}
#: Layers that are ours now -> (the class they had, whether fallbacks are errors).
_layers: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[type, bool]]" = weakref.WeakKeyDictionary()
_running = threading.local()


class Sdpa(str):
    """The implementation's name "sdpa" in a config, with the mark that its layers become ours."""

    strict: bool

    def __new__(cls, strict=False):
        self = super().__new__(cls, "sdpa")
        self.strict = strict
        return self

    def __reduce__(self):
        return Sdpa, (self.strict,)


def has_class_table(model_class: type) -> bool:
    """Whether the model's module picks attention classes by the implementation's name."""
    names = vars(sys.modules.get(model_class.__module__, types))
    return any(name.endswith("ATTENTION_CLASSES") and isinstance(names[name], dict) for name in names)


def has_function_table(model_class: type) -> bool:
    """Whether the model's module picks among functions of its own by the implementation's name (ModernBERT, before
    transformers 5)."""
    names = vars(sys.modules.get(model_class.__module__, types))
    return any(
        isinstance(table, dict) and isinstance(table.get("sdpa"), types.FunctionType) and "eager" in table
        for name, table in names.items()
        if name.isupper() and name != "ALL_ATTENTION_FUNCTIONS"
    )


def convert(model: torch.nn.Module, strict: bool) -> int:
    """Makes the sdpa attention layers of a model ours; returns how many."""
    count = 0
    for layer in model.modules():
        with _lock:
            old = type(layer)
            ours = None if layer in _layers else _subclass(old)
            if ours is not None:
                layer.__class__ = ours
                _layers[layer] = old, strict
                count += 1
    return count


def restore() -> None:
    """Gives all layers the class that they had."""
    with _lock:
        for layer, (old, _) in list(_layers.items()):
            layer.__class__ = old
        _layers.clear()


def is_ours(layer: torch.nn.Module) -> bool:
    """Whether convert() made this layer ours."""
    return layer in _layers


def _subclass(old):
    if old not in _subclasses:
        forward = vars(old).get("forward")
        ours = _rebound(forward) if isinstance(forward, types.FunctionType) else None
        _subclasses[old] = None if ours is None else _make_subclass(old, forward, ours)
    return _subclasses[old]


def _rebound(function, seen=()):
    """The same function with torch's attention replaced; None where it does not call that. Decorators are kept.

    seen: functions around this one: a wrapper may hold itself.
    """
    if function in seen:
        return None
    names, cells, found = function.__globals__, function.__closure__, _SDPA in function.__code__.co_names
    if found:
        names = _redirected(names)
    elif cells is not None:  # a decorator's wrapper holds the function that it wraps
        inner = [_rebound(c.cell_contents, (*seen, function)) if _holds_function(c) else None for c in cells]
        found = any(inner)
        cells = tuple(types.CellType(new) if new else cell for cell, new in zip(cells, inner, strict=True))
    if not found:
        return None
    ours = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    ours.__kwdefaults__ = function.__kwdefaults__
    return ours


def _holds_function(cell):
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # empty
        return False


def _make_subclass(old, forward, ours):
    def vivace_forward(self, *args, **kwargs):
        outer = getattr(_running, "layer", None)
        _running.layer = self
        try:
            return ours(self, *args, **kwargs)
        finally:
            _running.layer = outer

    vivace_forward.__wrapped__ = forward  # inspect.signature shows the model's
    name = old.__name__.replace("Sdpa", "Vivace")
    return type(name, (old,), {"forward": vivace_forward, "__module__": old.__module__})


def _redirected(names):
    """A module's globals, in which torch's attention is ours by whichever name it is reached."""
    functional = _View(F, **{_SDPA: _attention})
    nn = _View(torch.nn, functional=functional)
    views = (
        (torch, _View(torch, nn=nn)),
        (torch.nn, nn),
        (F, functional),
        (F.scaled_dot_product_attention, _attention),
    )
    result = dict(names)
    for name, value in names.items():
        for original, view in views:
            if value is original:
                result[name] = view
    return result


class _View:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's signature and layout, (batch, heads, tokens, head_dim)."""
    layer = _running.layer
    _, strict = _layers.get(layer, (None, False))
    top_left = is_causal and query.shape[-2] != key.shape[-2]  # torch's alignment differs from ours then
    if query.dim() != 4 or top_left or (attn_mask is not None and attn_mask.dim() != 4):
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return F.scaled_dot_product_attention(query, key, value, **options, enable_gqa=enable_gqa)
    softcap = getattr(getattr(layer, "config", None), "attn_logit_softcapping", None)
    out, _ = attention(
        layer,
        query,
        key,
        value,
        attn_mask,
        dropout=dropout_p,
        scaling=scale,
        softcap=softcap,
        is_causal=is_causal,
        strict=strict,
    )
    return out.transpose(1, 2)
