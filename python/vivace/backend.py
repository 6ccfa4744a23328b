"""`vivace.enable` and `vivace.disable`: which attention the models of this process get without naming vivace."""

import functools
import importlib.util
import logging
import sys
import threading

from vivace import policy
from vivace.patches import Patches

_lock = threading.RLock()
_patches: Patches | None = None
_enabled: str | None = None


def enable(wanted: str = "auto", *, force: bool = False) -> policy.Choice:
    """Makes transformers models that are built from now on use our attention, without a change to their code.

    wanted:
        "auto": where this machine's GPU allows, models that name no implementation get "vivace", and so do those that
            name flash_attention_2 where flash-attn is not installed; each call that our kernels cannot run (float32
            tensors, say) uses sdpa. Where the GPU does not allow it everything runs on sdpa (or eager), also what names
            flash_attention_2. The log says which and why.
        "flash_attention_2": the name flash_attention_2 works without flash-attn, on our kernels; a call that they
            cannot run is an error. Models that name something else, or nothing, are not touched.
        "sdpa": nothing is changed (and what an earlier call changed is put back).
        "eager": models that name no implementation get eager.
    force: replaces an installed flash-attn too, which otherwise keeps the name flash_attention_2.

    Undone by `disable`. A second call replaces the first.

    Returns:
        What was chosen for this machine's current device, and why.

    Raises:
        policy.UnavailableError: wanted is flash_attention_2, and the kernels cannot run here; the text says why, and
            nothing is changed.
        ValueError: wanted is none of the four.
    """
    global _patches, _enabled
    choice = policy.choose(wanted=wanted)
    with _lock:
        disable()
        policy.announce(choice, f"enable({wanted!r})")
        patches = Patches()
        try:
            if wanted != "sdpa" and importlib.util.find_spec("transformers") is not None:
                _enable_transformers(patches, wanted, choice, force)
        except BaseException:
            patches.undo()
            raise
        _patches, _enabled = patches, wanted
    return choice


def disable() -> None:
    """Undoes `enable`: every attribute that it changed is what it was.

    Models that were given ours without having named it go back to sdpa. A model that was built with flash_attention_2
    or "vivace" by name keeps that name, as it would in a program that never called `enable`.
    """
    global _patches, _enabled
    with _lock:
        patches, _patches, _enabled = _patches, None, None
        if patches is not None:
            patches.undo()


def enabled() -> str | None:
    """What `enable` was called with, or None."""
    return _enabled


def flash_attn_installed() -> bool:
    """Whether there is a flash_attn package other than our shim."""
    module = sys.modules.get("flash_attn")
    if module is not None:
        return not getattr(module, "__vivace_shim__", False)
    try:
        return importlib.util.find_spec("flash_attn") is not None
    except ValueError:
        return False


def _enable_transformers(patches, wanted, choice, force):
    from vivace.transformers import registry

    if not registry.registered():
        registry.register()
        patches.on_undo("transformers", registry.unregister)
    ours = choice.implementation == "vivace"
    theirs = flash_attn_installed() and not force
    rules = registry.rules
    patches.on_undo("models", functools.partial(_give_back, registry.defaulted))
    for name in ("default", "literal", "strict", "why"):
        patches.set(rules, name, getattr(rules, name))
    rules.why = choice.reason
    if wanted == "eager":
        rules.default = "eager"
        return
    if wanted == "auto" and ours:
        rules.default = "vivace"
    if theirs:
        policy.log_once(
            logging.INFO, "flash-attn is installed and keeps the name flash_attention_2 (force=True takes it)"
        )
        return
    rules.literal = "vivace" if ours else "sdpa"
    rules.strict = wanted == "flash_attention_2"
    if ours:
        from vivace.transformers.attention import attention

        registry.add(patches, registry.LITERAL, functools.partial(attention, strict=rules.strict))
        _serve_flash_functions(patches)


def _give_back(models):
    from vivace.transformers import registry

    for model in list(models):
        config = model.config
        if getattr(config, "_attn_implementation_internal", None) == registry.NAME:
            config._attn_implementation_internal = "sdpa"
    models.clear()


def _serve_flash_functions(patches):
    """transformers' own glue around flash-attn, which a few models call past AttentionInterface, gets our functions."""
    from transformers import modeling_flash_attention_utils as utils

    from vivace.flash_attn import shim

    if not hasattr(utils, "_lazy_imports"):
        return
    original = utils._lazy_imports

    @functools.wraps(original)
    def lazy_imports(implementation=None, *args, **kwargs):
        if implementation not in (None, "flash_attention_2"):
            return original(implementation, *args, **kwargs)
        with shim.visible():
            return original(implementation, *args, **kwargs)

    for name in vars(utils).keys() & {
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
        "_process_with_kvcache_kwargs_fn",
    }:
        patches.set(utils, name, None)  # what it loaded before; put back with the rest
    patches.set(utils, "_lazy_imports", lazy_imports)
    patches.set(utils, "is_flash_attn_2_available", lambda *args, **kwargs: True)
