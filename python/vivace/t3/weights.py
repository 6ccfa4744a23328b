"""Where a model's tensors come from: a safetensors file, a torch file, or a random generator."""

import hashlib
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vivace.t3.config import T3Config
from vivace.t3.layout import Shape, checkpoint_shapes


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or is not a T3 model."""


class Weights(Protocol):
    """Named tensors of Chatterbox's T3. `source` says in the manifest where they are from."""

    shapes: dict[str, Shape]
    source: dict

    def read(self, name: str) -> Tensor: ...


class SafetensorsWeights:
    """A .safetensors file, read tensor by tensor."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise CheckpointError(
                f"vivace: {path} is not a whole safetensors file ({truncation(path) or error})"
            ) from error
        self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118
        self.source = file_source(path)

    def read(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


class TorchWeights:
    """A file of torch.save with a state dict, or with one under "model". Loaded with weights_only: no code runs."""

    def __init__(self, path: Path):
        if is_torchscript(path):
            raise CheckpointError(
                f"vivace: {path} is a TorchScript archive, such as `vivace export` writes: expected the checkpoint "
                "that it was exported from"
            )
        try:
            state = load_torch(path)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
            raise CheckpointError(f"vivace: {path} is not a whole torch file ({first_line(error)})") from error
        if isinstance(state, dict) and "model" in state:
            state = state["model"]
        if isinstance(state, (list, tuple)) and state:
            state = state[0]
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"vivace: {path} holds no state dict (a mapping from names to tensors)")
        self.state = state
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}
        self.source = file_source(path)

    def read(self, name: str) -> Tensor:
        return self.state[name]


class RandomWeights:
    """A freshly initialised model, with the distributions that Chatterbox's constructors use.

    Each tensor has its own generator, seeded from the seed and its name: the order of reading does not matter.
    """

    def __init__(self, config: T3Config, seed: int):
        self.shapes = checkpoint_shapes(config)
        self.seed = seed
        self.source = {"random_seed": seed}

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name])
        key = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        if "norm" in name:
            return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        if name in ("text_emb.weight", "speech_emb.weight"):
            return tensor.normal_(generator=generator)
        if "pos_emb" in name or name.startswith("tfmr."):
            return tensor.normal_(std=0.02, generator=generator)
        if name.endswith("pre_attention_query"):
            bound = math.sqrt(3.0 / self.shapes[name][1])
        else:  # torch's default for a linear layer: uniform within 1 / sqrt(inputs)
            weight = self.shapes[name.removesuffix("bias") + "weight" if name.endswith("bias") else name]
            bound = 1.0 / math.sqrt(weight[1])
        return tensor.uniform_(-bound, bound, generator=generator)


def open_weights(path: str | Path) -> Weights:
    """A checkpoint file, its format found from its first bytes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated or of neither format.
    """
    path = Path(path)
    return SafetensorsWeights(path) if is_safetensors(path) else TorchWeights(path)


def is_safetensors(path: Path) -> bool:
    """Tells by the first bytes: the header's length in 8, then JSON.

    Raises:
        CheckpointError: it is not a torch file either (a zip archive or, before torch 1.6, a bare pickle).
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        return True
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return False
    raise CheckpointError(f"vivace: {path} is neither a safetensors nor a torch file")


def is_torchscript(path: Path) -> bool:
    """Whether a file is a program with weights, which torch.load would have us trust, and not weights alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_torch(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        return torch.load(path, map_location="cpu", weights_only=True)  # the old format cannot be mapped


def file_source(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"name": path.name, "sha256": digest.hexdigest()}


def truncation(path: Path) -> str | None:
    """What a safetensors file lacks at its end; None where its length is not what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > size - 8:
            return f"the header has {header_size} bytes, the file {size}"
        try:
            header = json.loads(file.read(header_size))
            ends = {
                name: 8 + header_size + entry["data_offsets"][1]
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, IndexError):
            return None
    cut = [name for name, end in ends.items() if end > size]
    return f"it has {size} of {max(ends.values())} bytes; cut off: {listing(cut)}" if cut else None


def listing(names, limit: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
