"""A line on stderr that says how far a run is, on a terminal only."""

import sys
import time


class Progress:
    """Counts ``total`` steps; the estimate assumes that they take equally long."""

    def __init__(self, total: int, stream=None):
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.shown = self.stream.isatty()
        self.start = time.monotonic()

    def step(self, done: int, title: str) -> None:
        if not self.shown:
            return
        passed = time.monotonic() - self.start
        left = f", about {passed / done * (self.total - done):.0f} s left" if done else ""
        self.stream.write(f"\r\033[K[{done + 1}/{self.total}] {title}{left}")
        self.stream.flush()

    def clear(self) -> None:
        if self.shown:
            self.stream.write("\r\033[K")
            self.stream.flush()
