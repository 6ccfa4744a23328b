"""Finds and loads vivace._C, the C++ engine: it belongs to one torch version and one Python version."""

import importlib.machinery
import importlib.util
import os
import sys
import threading
import types
from pathlib import Path

_lock = threading.Lock()


def load() -> types.ModuleType:
    """vivace._C, loaded once, with torch's libraries in the process before it.

    Raises:
        ImportError: it is missing or was built for another torch; the text names both versions.
    """
    with _lock:
        name = "vivace._C"
        if name in sys.modules:
            return sys.modules[name]
        import torch  # its libraries are what libvivace_host.so is linked to

        path = find()
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        try:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except ImportError as error:
            raise ImportError(
                f"vivace: {path} does not load with torch {torch.__version__}: {error}. The engine belongs to one "
                "torch version: reinstall vivace in this environment (pip install --no-build-isolation "
                "--force-reinstall --no-deps .). The operators (vivace.attention, ...) work without it"
            ) from None
        if _minor(module.torch_version) != _minor(torch.__version__):
            raise ImportError(
                f"vivace: {path} was built for torch {module.torch_version}, this is torch {torch.__version__}: "
                "reinstall vivace in this environment. The operators (vivace.attention, ...) work without it"
            )
        sys.modules[name] = module
        return module


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def find() -> Path:
    """The path of $VIVACE_EXTENSION_DIR/_C*.so, else of the package's, else of the one beside $VIVACE_OPS_LIBRARY (a
    CMake build).

    Raises:
        ImportError: there is none.
    """
    directories = [Path(__file__).resolve().parent]
    if chosen := os.environ.get("VIVACE_EXTENSION_DIR"):
        directories = [Path(chosen)]
    elif operators := os.environ.get("VIVACE_OPS_LIBRARY"):
        directories.append(Path(operators).resolve().parent)
    for directory in directories:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = directory / f"_C{suffix}"
            if path.is_file():
                return path
    looked = ", ".join(str(directory) for directory in directories)
    raise ImportError(
        f"vivace: the engine (_C{importlib.machinery.EXTENSION_SUFFIXES[0]}) is not in {looked}: run `pip install .`, "
        "or build with -DVIVACE_BUILD_PYTHON=ON. The operators (vivace.attention, ...) work without it"
    )
