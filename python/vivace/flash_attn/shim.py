"""Our functions under the name `flash_attn`, for code that imports that: opt-in, and never over the real package.

The shim is modules in sys.modules (flash_attn, flash_attn.flash_attn_interface, flash_attn.bert_padding) and a
distribution "flash-attn" in importlib.metadata, which transformers asks for its version. Nothing is written to disk.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import threading
import types
from pathlib import Path

_NAMES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")
_lock = threading.RLock()


def install_flash_attn_shim() -> types.ModuleType:
    """Makes `import flash_attn` give vivace's functions, in this process. Idempotent; undone by
    uninstall_flash_attn_shim.

    Returns:
        The module flash_attn.

    Raises:
        RuntimeError: the real flash-attn is installed; the text says where.
    """
    from vivace.backend import flash_attn_installed

    with _lock:
        present = sys.modules.get("flash_attn")
        if getattr(present, "__vivace_shim__", False):
            return present
        if flash_attn_installed():
            where = getattr(present, "__file__", None) or importlib.util.find_spec("flash_attn").origin
            raise RuntimeError(
                f"vivace: flash-attn is installed ({where}); the shim would hide it. "
                "Uninstall it, or call vivace.flash_attn's functions by their own name"
            )
        modules = _make_modules()
        sys.modules.update(modules)
        sys.meta_path.append(_FINDER)
        _forget_availability()
        return modules["flash_attn"]


def uninstall_flash_attn_shim() -> None:
    """Takes the shim away. Code that imported from it keeps the functions that it has."""
    with _lock:
        if not flash_attn_shim_installed():
            return
        for name in _NAMES:
            sys.modules.pop(name, None)
        if _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
        _forget_availability()


def flash_attn_shim_installed() -> bool:
    """Whether `import flash_attn` gives the shim."""
    return bool(getattr(sys.modules.get("flash_attn"), "__vivace_shim__", False))


@contextlib.contextmanager
def visible():
    """The shim's modules in sys.modules for a moment, whatever was there before."""
    with _lock:
        before = {name: sys.modules[name] for name in _NAMES if name in sys.modules}
        sys.modules.update(_make_modules())
        try:
            yield
        finally:
            for name in _NAMES:
                sys.modules.pop(name, None)
            sys.modules.update(before)


def _make_modules():
    from vivace import flash_attn as ours

    modules = {}
    for name in _NAMES:
        module = modules[name] = types.ModuleType(name, "vivace's functions under flash-attn's name.")
        package = name == "flash_attn"
        module.__spec__ = importlib.machinery.ModuleSpec(name, _Loader(), origin="vivace", is_package=package)
        module.__loader__ = module.__spec__.loader
        module.__package__ = "flash_attn"
        module.__vivace_shim__ = True
        if package:
            module.__path__ = []
    functions = {name: getattr(ours, name) for name in ours.__all__ if name != "bert_padding"}
    padding = {
        k: v for k, v in vars(ours.bert_padding).items() if callable(v) and v.__module__ == ours.bert_padding.__name__
    }
    vars(modules["flash_attn"]).update(functions, __version__=ours.__version__)
    vars(modules["flash_attn.flash_attn_interface"]).update(functions)
    vars(modules["flash_attn.bert_padding"]).update(padding)
    modules["flash_attn"].flash_attn_interface = modules["flash_attn.flash_attn_interface"]
    modules["flash_attn"].bert_padding = modules["flash_attn.bert_padding"]
    return modules


class _Loader(importlib.abc.Loader):
    def create_module(self, spec):
        return sys.modules.get(spec.name)

    def exec_module(self, module):
        pass


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says about flash-attn while the shim is there."""

    def read_text(self, filename):
        from vivace.flash_attn import __version__

        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {__version__}\n"
            "Summary: vivace's functions under flash-attn's name\n",
            "top_level.txt": "flash_attn\n",
        }
        return texts.get(filename)

    def locate_file(self, path):
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, fullname, path=None, target=None):
        return None

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        if context.name is None or context.name.replace("_", "-").lower() == "flash-attn":
            return iter((_Distribution(),))
        return iter(())


_FINDER = _Finder()


def _forget_availability():
    """Drops what transformers remembers about which packages there are."""
    module = sys.modules.get("transformers.utils.import_utils")
    if module is None:
        return
    for name, value in list(vars(module).items()):
        if "flash_attn" in name or name in ("_package_distribution_mapping", "_is_package_available"):
            clear = getattr(value, "cache_clear", None)
            if clear is not None:
                clear()
    mapping = vars(module).get("PACKAGE_DISTRIBUTION_MAPPING")
    if isinstance(mapping, dict):
        if flash_attn_shim_installed():
            mapping.setdefault("flash_attn", ["flash-attn"])
        elif mapping.get("flash_attn") == ["flash-attn"]:
            del mapping["flash_attn"]
