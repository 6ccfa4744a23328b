"""Voices: Chatterbox's conds.pt to safetensors, and random ones for demos and tests."""

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vivace.t3.config import T3Config
from vivace.t3.weights import CheckpointError, first_line, is_safetensors, is_torchscript, load_torch

METADATA = {"format": "vivace-voice", "version": "1"}
SPEAKER = "t3.speaker_emb"
PROMPT = "t3.cond_prompt_speech_tokens"
EMOTION = "t3.emotion_adv"


def convert_voice(path: str | Path, output: str | Path) -> dict[str, Tensor]:
    """Writes a voice as safetensors: the speaker, the prompt and, where there is one, the emotion for T3, and whatever
    the vocoder needs ("gen.*") as it was.

    Args:
        path: conds.pt as Chatterbox saves it, read with weights_only, or a voice in safetensors.

    Returns:
        What was written.

    Raises:
        CheckpointError: the file is damaged, or a tensor is missing or misshapen.
    """
    voice = check_voice(read_voice(Path(path)), str(path))
    _write(voice, Path(output))
    return voice


def write_random_voice(
    output: str | Path, seed: int = 0, prompt_tokens: int = T3Config.prompt_tokens
) -> dict[str, Tensor]:
    """Writes a voice that nobody has: random tokens, and a speaker embedding of unit length without negative elements.
    Such are the voice encoder's."""
    generator = torch.Generator().manual_seed(seed)
    speaker = torch.randn(1, T3Config.speaker_embed_size, generator=generator).relu()
    voice = {
        SPEAKER: torch.nn.functional.normalize(speaker),
        PROMPT: torch.randint(T3Config.first_invalid_speech_token, (1, prompt_tokens), generator=generator),
        EMOTION: torch.full((1, 1, 1), 0.5),
    }
    _write(voice, Path(output))
    return voice


def _write(voice: dict[str, Tensor], output: Path) -> None:
    """Whole or not at all, also over the file that the tensors came from, and with the permissions of any new file:
    those of safetensors' save_file (0.8) only their owner may read."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"vivace: there is no folder {output.parent} to write {output.name} to")
    with tempfile.TemporaryDirectory(prefix=".vivace-", dir=output.parent) as folder:
        written = Path(folder) / output.name
        written.write_bytes(save(voice, metadata=METADATA))
        os.replace(written, output)


def read_voice(path: Path) -> dict[str, Tensor]:
    """The tensors of a voice file, under the names of the safetensors format, unchecked."""
    if is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(
                f"vivace: voice {path} is not a whole safetensors file ({first_line(error)})"
            ) from error
    if is_torchscript(path):
        raise CheckpointError(f"vivace: voice {path} is a TorchScript archive, expected Chatterbox's conds.pt")
    try:
        conds = load_torch(path)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        raise CheckpointError(f"vivace: voice {path} is not a whole torch file ({first_line(error)})") from error
    if not isinstance(conds, dict) or not isinstance(conds.get("t3"), dict):
        raise CheckpointError(f"vivace: voice {path} has no 't3' conditionals: it is not Chatterbox's conds.pt")
    gen = conds.get("gen") or {}
    return {
        f"{group}.{name}": value
        for group, values in (("t3", conds["t3"]), ("gen", gen))
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def check_voice(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors in the shapes and dtypes of the format; others of "t3." are dropped."""
    missing = [name for name in (SPEAKER, PROMPT) if name not in tensors]
    if missing:
        raise CheckpointError(
            f"vivace: voice {where} lacks {', '.join(missing)} (it has {', '.join(tensors) or 'nothing'})"
        )
    speaker, prompt = tensors[SPEAKER], tensors[PROMPT]
    if speaker.dim() > 2 or speaker.numel() != T3Config.speaker_embed_size or not speaker.is_floating_point():
        raise CheckpointError(
            f"vivace: voice {where}: {SPEAKER} is {list(speaker.shape)} {speaker.dtype}, "
            f"expected [1, {T3Config.speaker_embed_size}] of a floating type"
        )
    if prompt.dim() > 2 or prompt.numel() == 0 or prompt.numel() != prompt.shape[-1] or prompt.is_floating_point():
        raise CheckpointError(
            f"vivace: voice {where}: {PROMPT} is {list(prompt.shape)} {prompt.dtype}, "
            "expected [1, tokens] of an integer type"
        )
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= T3Config.speech_vocab_size:
        raise CheckpointError(
            f"vivace: voice {where}: {PROMPT} has tokens from {low} to {high}, "
            f"expected 0 to {T3Config.speech_vocab_size - 1}"
        )
    voice = {SPEAKER: speaker.reshape(1, -1).float(), PROMPT: prompt.reshape(1, -1).long()}
    if EMOTION in tensors:
        if tensors[EMOTION].numel() != 1:
            raise CheckpointError(
                f"vivace: voice {where}: {EMOTION} is {list(tensors[EMOTION].shape)}, expected [1, 1, 1]"
            )
        voice[EMOTION] = tensors[EMOTION].reshape(1, 1, 1).float()
    voice |= {name: value for name, value in tensors.items() if name.startswith("gen.")}
    # A clone each: safetensors refuses tensors that share memory.
    return {name: value.detach().cpu().contiguous().clone() for name, value in voice.items()}
