"""A journal of changed attributes and entries, so that they can be put back exactly."""

import threading
from collections.abc import Callable
from typing import Any

_MISSING = object()


class Patches:
    """Remembers what it replaced; `undo` puts it back, last change first.

    An attribute that an object inherited (a method of a base class, say) is removed again rather than copied.
    """

    def __init__(self):
        self._undo: list[tuple[str, Callable[[], None]]] = []
        self._lock = threading.RLock()

    def set(self, target: Any, name: str, value: Any) -> None:
        """target.name = value."""
        with self._lock:
            own = vars(target).get(name, _MISSING) if hasattr(target, "__dict__") else getattr(target, name, _MISSING)

            def undo():
                if own is _MISSING:
                    delattr(target, name)
                else:
                    setattr(target, name, own)

            setattr(target, name, value)
            self._undo.append((f"{getattr(target, '__name__', type(target).__name__)}.{name}", undo))

    def set_item(self, mapping: Any, key: Any, value: Any) -> None:
        """mapping[key] = value."""
        with self._lock:
            old = mapping.get(key, _MISSING)

            def undo():
                if old is _MISSING:
                    del mapping[key]
                else:
                    mapping[key] = old

            mapping[key] = value
            self._undo.append((f"[{key!r}]", undo))

    def on_undo(self, name: str, function: Callable[[], None]) -> None:
        """Runs function when the patches are undone."""
        with self._lock:
            self._undo.append((name, function))

    def __len__(self) -> int:
        return len(self._undo)

    def names(self) -> list[str]:
        """What was changed, oldest first."""
        return [name for name, _ in self._undo]

    def undo(self) -> None:
        """Puts everything back. What fails does not keep the rest from being put back; the first error is raised."""
        with self._lock:
            first = None
            while self._undo:
                _, function = self._undo.pop()
                try:
                    function()
                except Exception as error:
                    first = first or error
            if first is not None:
                raise first
