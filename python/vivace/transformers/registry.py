"""Makes `attn_implementation="vivace"` known to transformers, and asks our rules when a model picks its implementation.

What changes in transformers: an entry in AttentionInterface and in AttentionMaskInterface (where the version has
them), and three methods of PreTrainedModel that consult `rules` and then go on as before. `unregister` puts all of it
back.
"""

import functools
import logging
import threading
import weakref
from dataclasses import dataclass

from vivace import policy
from vivace.patches import Patches
from vivace.transformers import classes
from vivace.transformers.attention import attention
from vivace.transformers.masks import attention_mask

NAME = "vivace"
LITERAL = "flash_attention_2"

_lock = threading.RLock()
_patches: Patches | None = None


@dataclass
class Rules:
    """What `vivace.enable` wants of models that do not ask for us by name; nothing, until it is called."""

    default: str | None = None  # for models that name no implementation: "vivace", "eager", or None: transformers' own
    literal: str | None = None  # for flash_attention_2: "vivace", "sdpa", or None: transformers' own
    strict: bool = False  # flash_attention_2 raises where the kernels cannot run
    why: str = ""  # for the log


rules = Rules()
#: Models that chose ours through rules.default; vivace.disable gives them sdpa back.
defaulted: "weakref.WeakSet" = weakref.WeakSet()


def register() -> None:
    """Makes the name vivace known to transformers. Idempotent; models that name another implementation do not notice.

    Raises:
        ImportError: transformers is not installed, or older than 4.46.
    """
    global _patches
    with _lock:
        if _patches is not None:
            return
        import transformers
        from transformers import modeling_utils

        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        if version < (4, 46):
            raise ImportError(f"vivace: transformers is {transformers.__version__}, expected 4.46 or newer")
        patches = Patches()
        try:
            add(patches, NAME, attention)
            _hook(patches, modeling_utils.PreTrainedModel)
        except BaseException:
            patches.undo()
            raise
        _patches = patches


def unregister() -> None:
    """Puts transformers back as it was. Models that still name vivace cannot run afterwards."""
    global _patches
    with _lock:
        if _patches is not None:
            patches, _patches = _patches, None
            try:
                classes.restore()
            finally:
                patches.undo()


def registered() -> bool:
    """Whether transformers knows the name."""
    return _patches is not None


def add(patches: Patches, name: str, function) -> None:
    """Enters an attention function, and our mask, under a name, where this version has such tables."""
    from transformers import modeling_utils

    functions = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        return
    patches.set_item(getattr(functions, "_global_mapping", functions), name, function)
    try:
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:  # before 4.53: unknown names get a matrix
        return
    patches.set_item(AttentionMaskInterface._global_mapping, name, attention_mask)


def choose_for(model_class: type, requested):
    """The implementation that a model gets: what it requested, or what the rules put in its place.

    Returns:
        (implementation, whether it is ours): implementation is a name, None for transformers' default, or classes.Sdpa.
    """
    if requested == NAME:
        return _ours(model_class, NAME, False), True
    if requested == LITERAL and rules.literal == "vivace":
        reason = None if rules.strict else _why_not(model_class, LITERAL)
        if reason is None:
            return _ours(model_class, LITERAL, rules.strict), True
        policy.log_once(logging.WARNING, f"{reason}: {_alternative(model_class)}")
        return None, False
    if requested == LITERAL and rules.literal == "sdpa":
        policy.log_once(logging.WARNING, f"{model_class.__name__} asks for {LITERAL}: sdpa ({rules.why})")
        return None, False
    if requested is None and rules.default == "vivace" and _takes_ours(model_class):
        policy.log_once(logging.INFO, f"{model_class.__name__}: vivace ({rules.why})")
        return _ours(model_class, NAME, False), True
    if requested is None and rules.default == "eager":
        return "eager", False
    return requested, False


def _ours(model_class, name, strict):
    reason = _why_not(model_class, name)
    if reason is not None:
        raise ValueError(f'vivace: {reason}; load it with attn_implementation="{_alternative(model_class)}"')
    return name if _has_interface(model_class) else classes.Sdpa(strict)


def _why_not(model_class, name):
    """Why a model cannot take `name`, in one clause, or None."""
    if classes.has_function_table(model_class):
        return f"{model_class.__name__} has attention functions of its own, so that {name} cannot take their place"
    sdpa = bool(getattr(model_class, "_supports_sdpa", False))
    if not _has_interface(model_class):
        lacks = (
            f"{model_class.__name__} has no sdpa attention, whose place {name} takes in this version of transformers"
        )
        return None if sdpa else lacks
    if sdpa or getattr(model_class, "_supports_flash_attn", False):
        return None
    return f"{model_class.__name__} computes its attention itself, so that {name} cannot take its place"


def _alternative(model_class):
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def _has_interface(model_class):
    """Whether the model looks its attention up by name, in transformers' AttentionInterface."""
    from transformers import modeling_utils

    return hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS") and not classes.has_class_table(model_class)


def _takes_ours(model_class):
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    follows_interface = classes.has_class_table(model_class) or can_set is None or can_set()
    own = classes.has_function_table(model_class)
    return bool(getattr(model_class, "_supports_sdpa", False)) and follows_interface and not own


def _hook(patches, base):
    if hasattr(base, "_check_and_adjust_attn_implementation"):  # 4.54 and newer
        for name in ("_check_and_adjust_attn_implementation", "get_correct_attn_implementation"):
            patches.set(base, name, _choosing(getattr(base, name)))
    else:
        patches.set(base, "_autoset_attn_implementation", classmethod(_autoset(base._autoset_attn_implementation)))
    patches.set(base, "post_init", _converting(base.post_init))


def _choosing(method):
    @functools.wraps(method)
    def choosing(self, attn_implementation, *args, **kwargs):
        chosen, ours = choose_for(type(self), attn_implementation)
        if not ours:
            return method(self, chosen, *args, **kwargs)
        if attn_implementation is None:
            defaulted.add(self)
        return chosen

    return choosing


def _autoset(method):
    @functools.wraps(method)
    def autoset(cls, config, *args, **kwargs):
        requested = getattr(config, "_attn_implementation_internal", None)
        if requested is None and kwargs.get("use_flash_attention_2"):
            requested, kwargs = LITERAL, {**kwargs, "use_flash_attention_2": False}
        if not isinstance(requested, dict | classes.Sdpa):
            chosen, ours = choose_for(cls, requested)
            if ours or chosen != requested:
                config._attn_implementation_internal = chosen
        return method.__func__(cls, config, *args, **kwargs)

    return autoset


def _converting(method):
    @functools.wraps(method)
    def post_init(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        name = getattr(self.config, "_attn_implementation_internal", None)
        if isinstance(name, classes.Sdpa):
            classes.convert(self, name.strict)
        return result

    return post_init
