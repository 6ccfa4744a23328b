"""PNGs of figures by a headless Chromium, where there is one."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """$VIVACE_BROWSER, else the first Chromium on the PATH."""
    chosen = os.environ.get("VIVACE_BROWSER")
    return shutil.which(chosen) if chosen else next(filter(None, map(shutil.which, BROWSERS)), None)


def run(page: str, *options: str, browser: str | None = None) -> str:
    """Opens a page without a network; returns what the browser printed.

    Raises:
        OSError: there is no browser, or it failed.
    """
    program = browser or find()
    if program is None:
        raise OSError(f"no browser: install one of {', '.join(BROWSERS)}, or set VIVACE_BROWSER")
    with tempfile.TemporaryDirectory(prefix="vivace-browser-") as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", *options, page]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise OSError(f"{program} ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
    return done.stdout


def screenshot(page: str, path: Path, width: int, height: int, *options: str, scale: float = 2) -> None:
    """Writes what a window of that size shows, ``scale`` pixels for each of its own."""
    path.unlink(missing_ok=True)
    run(
        page,
        f"--screenshot={path}",
        f"--window-size={width},{height}",
        f"--force-device-scale-factor={scale:g}",
        *options,
    )
    if not path.exists():
        raise OSError(f"the browser wrote no {path}")
