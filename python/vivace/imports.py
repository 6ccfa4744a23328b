"""Calls back when a module has been imported, without importing it."""

import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Callable

_lock = threading.RLock()
_waiting: dict[str, list[Callable]] = {}


def when_imported(name: str, callback: Callable) -> None:
    """Calls callback(module) now if module `name` is imported, else right after its import.

    An exception of the callback is the importer's: let it catch what shall not stop an import.
    """
    module = sys.modules.get(name)
    if module is not None and not _is_loading(module):
        callback(module)
        return
    with _lock:
        _waiting.setdefault(name, []).append(callback)
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


def cancel(name: str, callback: Callable) -> None:
    """Forgets a callback that was not called yet."""
    with _lock:
        if callback in _waiting.get(name, ()):
            _waiting[name].remove(callback)


def _is_loading(module):
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module as the other finders do, and wraps its loader."""

    _searching = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        if not _waiting.get(fullname) or getattr(self._searching, "name", None) == fullname:
            return None
        self._searching.name = fullname
        try:
            spec = None
            for finder in sys.meta_path:
                if finder is not self and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(fullname, path, target)
                    if spec is not None:
                        break
        finally:
            self._searching.name = None
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        with _lock:
            callbacks = _waiting.pop(module.__name__, [])
        for callback in callbacks:
            callback(module)

    def __getattr__(self, name):
        return getattr(self._loader, name)
