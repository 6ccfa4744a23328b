"""Chatterbox's T3 on vivace's operators: the module, its checkpoints, and its export to the C++ host."""

from vivace.t3.archive import ArchiveError, load, read_manifest, verify
from vivace.t3.checkpoint import checkpoint_config, load_model
from vivace.t3.config import RopeScaling, T3Config, preset
from vivace.t3.export import export, script
from vivace.t3.model import T3
from vivace.t3.voice import convert_voice, write_random_voice
from vivace.t3.weights import CheckpointError, RandomWeights, open_weights

__all__ = [
    "T3",
    "ArchiveError",
    "CheckpointError",
    "RandomWeights",
    "RopeScaling",
    "T3Config",
    "checkpoint_config",
    "convert_voice",
    "export",
    "load",
    "load_model",
    "open_weights",
    "preset",
    "read_manifest",
    "script",
    "verify",
    "write_random_voice",
]
