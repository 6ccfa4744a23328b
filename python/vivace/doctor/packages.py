"""Versions of what works together, and whether they import."""

import importlib
import importlib.metadata
from typing import Any

from vivace.doctor.attempt import attempt

#: Distribution -> the module that shows whether it works; None: only its version is of interest.
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "chatterbox-tts": None,  # importing it takes seconds and loads a vocoder
    "flash-attn": "flash_attn",
    "kernels": None,
    "safetensors": "safetensors",
}


def packages() -> dict[str, dict[str, Any]]:
    from vivace import __version__

    found: dict[str, dict[str, Any]] = {"vivace": {"version": __version__}}
    for distribution, module in PACKAGES.items():
        version = installed(distribution)
        found[distribution] = {"version": version}
        if version is not None and module is not None:
            imported = attempt(lambda module=module: {"version": str(importlib.import_module(module).__version__)})
            found[distribution] |= imported
    if found["torch"]["version"] is not None and "error" not in found["torch"]:
        found["torch"] |= attempt(torch_build)
    return found


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build() -> dict[str, Any]:
    import torch

    return {"cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
