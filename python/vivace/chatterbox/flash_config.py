"""The configuration "Llama_520M_Flash" for Chatterbox's T3, chosen where flash attention can run.

As a patched Chatterbox has it: T3(hp) with llama_config_name "Llama_520M" takes "Llama_520M_Flash" where flash
attention can be imported and the GPU is of compute capability 8.0 or newer, and logs either way. The two differ in the
attention implementation alone.
"""

import functools
import logging
import threading
from types import ModuleType
from typing import Any

from vivace.patches import Patches

logger = logging.getLogger("vivace")

SUFFIX = "_Flash"
FOUND = "Flash-Attention2 detected: Using optimized configuration"
NOT_FOUND = "Flash-Attention2 not available: Using standard SDPA configuration"

_lock = threading.RLock()
_patches: Patches | None = None


def flash_attention_available() -> bool:
    """Whether transformers' "flash_attention_2" can run here: flash-attn or vivace in its place, on a GPU of compute
    capability 8.0 or newer. Never raises."""
    return why_not() is None


def why_not() -> str | None:
    """Why flash attention cannot run here, in one clause; None where it can."""
    import torch

    try:
        if getattr(torch.version, "hip", None):
            return "this torch is for AMD GPUs"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        from vivace import backend, policy

        if backend.flash_attn_installed():
            return None
        if backend.enabled() in ("sdpa", "eager"):
            return f"vivace.enable({backend.enabled()!r}) is in force"
        return policy.why_not(torch.device("cuda"))
    except Exception as error:  # a broken driver, or flash_attn half installed
        return str(error) or type(error).__name__


def register_llama_520m_flash() -> None:
    """Makes Chatterbox's T3(hp) choose "Llama_520M_Flash" by itself; models that exist are left alone.

    Where flash-attn is not installed, vivace.enable("auto") puts vivace's kernel behind the name flash_attention_2. T3
    computes in float32 unless it is cast, and flash kernels take halves: until then it runs on sdpa all the same.
    vivace.accelerate() needs none of this.

    Raises:
        ImportError: chatterbox-tts is not installed.
    """
    global _patches
    from chatterbox.models.t3 import t3 as chatterbox

    with _lock:
        if _patches is not None:
            return
        patches = Patches()
        try:
            _register(chatterbox, patches)
        except BaseException:
            patches.undo()
            raise
        _patches = patches


def unregister_llama_520m_flash() -> None:
    """Takes register_llama_520m_flash() back. T3s that were built meanwhile keep their configuration."""
    global _patches
    with _lock:
        if _patches is not None:
            patches, _patches = _patches, None
            patches.undo()


def on_startup(wanted: str) -> None:
    """VIVACE_ENABLE for Chatterbox, called when its T3 has been imported."""
    if wanted in ("auto", "flash_attention_2"):
        register_llama_520m_flash()


def _register(chatterbox: ModuleType, patches: Patches) -> None:
    configs, t3 = chatterbox.LLAMA_CONFIGS, chatterbox.T3
    for name in [name for name, config in configs.items() if config.get("model_type") == "llama"]:
        if name + SUFFIX not in configs:
            patches.set_item(configs, name + SUFFIX, flash_config(configs[name]))
    from vivace import backend

    if flash_attention_available() and not backend.flash_attn_installed() and backend.enabled() is None:
        # "auto": what the kernel cannot take, T3's float32 above all, runs on sdpa instead of failing.
        backend.enable("auto")
        patches.on_undo("vivace.enable", backend.disable)

    original = t3.__init__

    @functools.wraps(original)
    def init(self: Any, hp: Any = None, *args: Any, **kwargs: Any) -> None:
        if hp is None:
            hp = default_hp(chatterbox, original)
        name = hp.llama_config_name
        if name + SUFFIX not in configs:
            return original(self, hp, *args, **kwargs)
        available = flash_attention_available()
        logger.info(FOUND if available else NOT_FOUND)
        if not available:
            return original(self, hp, *args, **kwargs)
        with _lock:  # hp may be shared; T3 keeps it, and its name is to stay
            hp.llama_config_name = name + SUFFIX
            try:
                return original(self, hp, *args, **kwargs)
            finally:
                hp.llama_config_name = name

    patches.set(t3, "__init__", init)
    patches.set(t3, "_flash_attention_available", lambda self: flash_attention_available())


def flash_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with flash attention, under both names that transformers has known."""
    return {**config, "attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}


def default_hp(chatterbox: ModuleType, init: Any) -> Any:
    """What T3() takes without an argument: the English model, by default or by the signature's value."""
    default = init.__defaults__[0] if init.__defaults__ else None
    return chatterbox.T3Config.english_only() if default is None else default
