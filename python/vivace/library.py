"""Finds and loads libvivace_ops.so, which registers torch.ops.vivace."""

import ctypes
import json
import mmap
import os
import threading
from pathlib import Path

import torch

#: The oldest torch whose stable ABI has what the library calls.
MINIMUM_TORCH = (2, 10)

_FILE = "libvivace_ops.so"
#: Where the wheel puts it.
INSTALLED = Path(__file__).resolve().parent / "lib" / _FILE

_lock = threading.Lock()
_loaded: Path | None = None
_error: str | None = None


class OperatorLibraryError(ImportError):
    """libvivace_ops.so is missing or does not load; the text says why."""


def find() -> Path:
    """The operator library's path: $VIVACE_OPS_LIBRARY, else vivace/lib/libvivace_ops.so beside this file.

    Raises:
        OperatorLibraryError: there is no such file.
    """
    chosen = os.environ.get("VIVACE_OPS_LIBRARY")
    path = Path(chosen) if chosen else INSTALLED
    if not path.is_file():
        where = "named by VIVACE_OPS_LIBRARY" if chosen else "of this installation"
        raise OperatorLibraryError(
            f"vivace: the operator library {where} does not exist: {path}; run `pip install .`, "
            f"or build with CMake and set VIVACE_OPS_LIBRARY to <build>/lib/{_FILE}"
        )
    return path


def load() -> Path:
    """Loads the operator library, once, and registers what Python adds to it: fake implementations, gradients, and our
    name in torch's registry of flash attention (which activates nothing).

    Returns:
        The path it was loaded from.

    Raises:
        OperatorLibraryError: it is missing, or does not load with this torch; the text names the cause.
    """
    global _loaded, _error
    with _lock:
        if _loaded is not None:
            return _loaded
        if _error is not None:
            raise OperatorLibraryError(_error)
        try:
            path = find()
            _check_torch(path)
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                raise OperatorLibraryError(_load_failure(path, error)) from None
        except OperatorLibraryError as error:
            _error = str(error)
            raise
        from vivace import autograd, fake, recompute, torch_sdpa

        try:
            fake.register()
            recompute.register()
            autograd.register()
            torch_sdpa.register()
        except Exception as error:
            _error = _registration_failure(path, error)
            raise OperatorLibraryError(_error) from error
        _loaded = path
        return path


def is_available() -> bool:
    """Whether the operators load here. Never raises."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why the operators do not load here, or None where they do. Never raises."""
    try:
        load()
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def read_build_info(path: str | os.PathLike) -> dict | None:
    """What a library was built for, read from its file without loading it: None where the file does not say."""
    marker = b"VIVACE_BUILD_INFO="
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(marker)
            if start < 0:
                return None
            start += len(marker)
            return json.loads(content[start : content.find(b"\0", start)])
    except (OSError, ValueError):
        return None


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _check_torch(path: Path) -> None:
    if _torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise OperatorLibraryError(
            f"vivace: torch {torch.__version__} is too old for {path}, which needs torch {wanted} or newer"
        )


def _load_failure(path: Path, error: OSError) -> str:
    # torch hides the loader's message; the loader gives it again.
    cause = str(error)
    try:
        ctypes.CDLL(str(path))
    except OSError as loader_error:
        cause = str(loader_error)
    info = read_build_info(path)
    built = (
        f"built with torch {info['torch_built']} for torch {info['torch_target']} or newer" if info else "unknown build"
    )
    return f"vivace: {path} does not load: {cause} ({built}; this is torch {torch.__version__})"


def _registration_failure(path: Path, error: Exception) -> str:
    from vivace import __version__

    info = read_build_info(path)
    version = info["version"] if info else "an unknown version"
    return (
        f"vivace: {path} ({version}) does not go with this Python package ({__version__}): {error}; "
        "build and install both from one source"
    )
