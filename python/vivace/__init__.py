"""vivace: flash attention as torch operators, and a C++ engine for Chatterbox T3.

`import vivace` imports nothing else: torch and the operator library are loaded when an operator is first used, or by
`import vivace.ops`, which also makes them available as `torch.ops.vivace`.
"""

import importlib
from pathlib import Path

__version__ = (Path(__file__).parent / "VERSION").read_text(encoding="utf-8").strip()

# Public name -> module that has it.
_LAZY = {
    "attention": "vivace.ops",
    "attention_varlen": "vivace.ops",
    "attention_with_kvcache": "vivace.ops",
    "rms_norm": "vivace.ops",
    "add_rms_norm": "vivace.ops",
    "rotary_embedding": "vivace.ops",
    "rotary_embedding_": "vivace.ops",
    "silu_gate": "vivace.ops",
    "sample": "vivace.ops",
    "sampling_probs": "vivace.ops",
    "sample_advance": "vivace.ops",
    "decode_step": "vivace.ops",
    "decode_step_workspace": "vivace.ops",
    "decode_step_kernel": "vivace.ops",
    "force_arch": "vivace.ops",
    "build_info": "vivace.ops",
    "attention_kernel": "vivace.ops",
    "is_available": "vivace.library",
    "unavailable_reason": "vivace.library",
    "enable": "vivace.backend",
    "disable": "vivace.backend",
    "enabled": "vivace.backend",
    "choose": "vivace.policy",
    "install_flash_attn_shim": "vivace.flash_attn.shim",
    "uninstall_flash_attn_shim": "vivace.flash_attn.shim",
    "generate": "vivace.engine",
    "Engine": "vivace.engine",
    "export": "vivace.t3",
    "accelerate": "vivace.chatterbox",
    "restore": "vivace.chatterbox",
    "generate_batch": "vivace.chatterbox",
    "stream_tokens": "vivace.chatterbox",
    "doctor": "vivace.doctor",
}

_SUBMODULES = ("chatterbox", "flash_attn", "ops", "transformers")

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"vivace.{name}")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'vivace' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
