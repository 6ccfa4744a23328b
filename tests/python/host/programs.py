"""Programs of the C++ build that tests run."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def built(name):
    """A program of the build: in $VIVACE_BUILD_DIR, else the newest under build*/."""
    directory = os.environ.get("VIVACE_BUILD_DIR")
    roots = [Path(directory)] if directory else sorted(ROOT.glob("build*"))
    found = [path for root in roots for path in root.glob(f"**/{name}") if path.is_file() and os.access(path, os.X_OK)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
