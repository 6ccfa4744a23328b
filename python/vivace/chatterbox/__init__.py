"""Chatterbox in Python on vivace's engine: accelerate, restore, generate_batch, stream_tokens."""

from vivace.chatterbox.accelerate import accelerate, describe, is_accelerated, restore
from vivace.chatterbox.flash_config import on_startup, register_llama_520m_flash, unregister_llama_520m_flash
from vivace.chatterbox.pipeline import generate_batch, stream_tokens

__all__ = [
    "accelerate",
    "describe",
    "generate_batch",
    "is_accelerated",
    "on_startup",
    "register_llama_520m_flash",
    "restore",
    "stream_tokens",
    "unregister_llama_520m_flash",
]
