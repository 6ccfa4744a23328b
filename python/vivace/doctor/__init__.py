"""What of vivace works here, what a model would run on, and why not on ours: `vivace doctor`, or vivace.doctor().

Nothing here raises for what it finds broken: that is its answer.
"""

import sys
import types
from typing import Any

from vivace.doctor.report import Report, make_report

__all__ = ["Report", "doctor"]


def doctor(model: Any = None, *, self_test: bool = True, t3: str | bool = False) -> Report:
    """Looks at this installation.

    Args:
        model: also say what this would run on, layer by layer: a module, a Chatterbox pipeline, a path, or a Hub id.
        self_test: run every operator once against torch, in a process of its own (at most 10 s besides its start).
        t3: build a T3 with random weights, run it, and generate through accelerate(): True or "real" (2.2 GB), "tiny".

    Returns:
        A dict of what was found, which prints as text; `status` is the exit status of `vivace doctor`.
    """
    return make_report(model, self_test, "real" if t3 is True else t3 or None)


class _Callable(types.ModuleType):
    """vivace.doctor is this module once it has been imported; it shall stay callable then."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return doctor(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
