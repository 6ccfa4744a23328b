"""A line on stderr that says how far a run is, on a terminal only."""

import shutil
import statistics
import sys
import time
from collections.abc import Sequence


class Progress:
    """Counts steps of a known weight each.

    The estimate takes a step's time to be in proportion to its weight, at the median rate of those that are done: the
    first one often loads libraries. What is prepared before it is not counted.
    """

    def __init__(self, weights: Sequence[float], stream=None):
        self.weights = list(weights)
        self.stream = sys.stderr if stream is None else stream
        self.shown = self.stream.isatty()
        self.times: list[float] = []  # at which the steps began

    def step(self, done: int, title: str) -> None:
        """Says that step ``done`` (the first is 0) begins."""
        self.times.append(time.monotonic())
        if not self.shown:
            return
        left = self.left()
        told = f", about {duration(left)} left" if left is not None else ""
        self.write(f"[{done + 1}/{len(self.weights)}] {title}{told}")

    def left(self) -> float | None:
        """Seconds from the beginning of the last step to the end; None where no step was done before it."""
        done = len(self.times) - 1
        if done < 1:
            return None
        rates = [(self.times[i + 1] - self.times[i]) / self.weights[i] for i in range(done)]
        return statistics.median(rates) * sum(self.weights[done:])

    def say(self, text: str) -> None:
        """What goes on before the first step."""
        if self.shown:
            self.write(text)

    def write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
        self.stream.write(f"\r\033[K{text[:width]}")
        self.stream.flush()

    def clear(self) -> None:
        if self.shown:
            self.write("")


def duration(seconds: float) -> str:
    """ "40 s", "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
