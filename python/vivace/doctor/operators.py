"""Whether the operators and the engine load, and compute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vivace.doctor.attempt import attempt, first_line

_SECONDS = 120  # importing torch from a cold disk takes most of it; the test itself has 10


def operators(self_test: bool) -> dict[str, Any]:
    """{"loaded": bool, "reason", "chosen", "installed", "path", "build", "self_test"}.

    chosen: the library that $VIVACE_OPS_LIBRARY names, instead of the one that is `installed` (None: there is none).
    """
    from vivace import library

    reason = library.unavailable_reason()
    found: dict[str, Any] = {"loaded": reason is None}
    if reason is not None:
        found["reason"] = reason
    if chosen := os.environ.get("VIVACE_OPS_LIBRARY"):
        found["chosen"] = chosen
        found["installed"] = str(library.INSTALLED) if library.INSTALLED.is_file() else None
    path = attempt(lambda: str(library.find()))
    if isinstance(path, str):
        found["path"] = path
        found["build"] = library.read_build_info(path)
    if reason is None and self_test:
        found["self_test"] = run_self_test()
    return found


def run_self_test() -> dict[str, Any]:
    """The self-test in a process of its own: a crash or a hang there is its result."""
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vivace.doctor.selftest"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"no answer within {_SECONDS} s"}
    except OSError as error:
        return {"ok": False, "error": first_line(error)}
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"ok": False, "error": f"it ended with status {done.returncode}: {last}"}
    return {"ok": done.returncode == 0, **result}


def engine() -> dict[str, Any]:
    """{"loaded": bool, "reason", "chosen"}: vivace._C, which belongs to one torch version and one Python version.

    chosen: the folder that $VIVACE_EXTENSION_DIR names.
    """
    from vivace import extension

    chosen = os.environ.get("VIVACE_EXTENSION_DIR")
    found: dict[str, Any] = {"chosen": chosen} if chosen else {}
    try:
        extension.load()
    except Exception as error:
        return {"loaded": False, "reason": str(error), **found}
    return {"loaded": True, **found}
