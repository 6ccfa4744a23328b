"""VIVACE_ENABLE in the environment, for programs that cannot be edited. vivace.pth runs this when Python starts, only
if the variable is set.

    VIVACE_ENABLE=auto              vivace.enable("auto") when the program has imported transformers;
                                    also flash_attention_2, sdpa, eager
    VIVACE_ENABLE=flash_attn        vivace.install_flash_attn_shim() when it has imported torch
    VIVACE_ENABLE=auto,flash_attn   both

A start must not fail, nor import torch: what goes wrong is a warning, and the program runs as without vivace.
"""

import os

from vivace.imports import when_imported
from vivace.policy import WANTED, logger

_started: set[str] = set()  # what has been arranged: Python may read the .pth of several directories


def start(value: str | None = None) -> None:
    """Arranges what VIVACE_ENABLE (or value) asks for."""
    value = os.environ.get("VIVACE_ENABLE", "") if value is None else value
    words = [word for word in value.replace(" ", "").split(",") if word]
    for word in words:
        if word in _started:
            continue
        _started.add(word)
        if word in WANTED:
            when_imported("transformers.modeling_utils", lambda module, word=word: _enable(word))
            when_imported("chatterbox.models.t3.t3", lambda module, word=word: _chatterbox(word))
        elif word == "flash_attn":
            when_imported("torch", lambda module: _shim())
        elif word not in ("0", "off", "no", "none"):
            logger.warning("vivace: VIVACE_ENABLE=%s has %r, expected %s or flash_attn", value, word, ", ".join(WANTED))


def _enable(word):
    try:
        from vivace.backend import enable

        enable(word)
    except Exception as error:
        logger.warning("vivace: VIVACE_ENABLE=%s: %s", word, error)


def _chatterbox(word):
    try:
        from vivace import chatterbox
    except ImportError:
        return
    try:
        chatterbox.on_startup(word)
    except Exception as error:
        logger.warning("vivace: VIVACE_ENABLE=%s: %s", word, error)


def _shim():
    try:
        from vivace.flash_attn.shim import install_flash_attn_shim

        install_flash_attn_shim()
    except Exception as error:
        logger.warning("vivace: VIVACE_ENABLE=flash_attn: %s", error)
