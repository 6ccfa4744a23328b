"""Values of flags: lists and ranges in the way of llama-bench. No torch."""

import argparse
import re
from collections.abc import Callable, Sequence

_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
MOST_VALUES = 10_000


def numbers(text: str) -> list[int]:
    """ "64,128" is [64, 128]; "1-3" is [1, 2, 3]; "2-8+2" is [2, 4, 6, 8]; "512-4096*2" is [512, 1024, 2048, 4096].

    Raises:
        argparse.ArgumentTypeError: anything else, or a range without an end.
    """
    values = []
    for part in text.split(","):
        part = part.strip()
        if part.isdecimal():
            values.append(int(part))
            continue
        match = _RANGE.fullmatch(part)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a number, first-last, first-last+step or first-last*factor"
            )
        first, last, step = int(match[1]), int(match[2]), int(match[4] or 1)
        multiplied = match[3] == "*"
        if first > last or step < (2 if multiplied else 1) or (multiplied and first == 0):
            raise argparse.ArgumentTypeError(f"the range {part!r} never reaches its end")
        while first <= last:
            values.append(first)
            if len(values) > MOST_VALUES:
                raise argparse.ArgumentTypeError(f"the range {part!r} has more than {MOST_VALUES} values")
            first = first * step if multiplied else first + step
    return values


def positive(text: str) -> list[int]:
    """`numbers`, all above 0."""
    values = numbers(text)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a 0, expected numbers above it")
    return values


def words(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated words, each one of ``choices``."""

    def parse(text: str) -> list[str]:
        values = [part.strip() for part in text.split(",")]
        for value in values:
            if value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return values

    return parse


def windows(text: str) -> list[int]:
    """Keys that a query sees before its own; "none" (-1): all."""
    return [-1 if part.strip() == "none" else numbers(part)[0] for part in text.split(",")]


def lengths(text: str) -> list[str]:
    """Batches of packed sequences, COUNTxMIN-MAX: "64x60-400" is 64 sequences of 60 to 400 tokens."""
    values = [part.strip() for part in text.split(",")]
    for value in values:
        split_lengths(value)
    return values


def split_lengths(text: str) -> tuple[int, int, int]:
    """COUNTxMIN-MAX: its three numbers."""
    match = re.fullmatch(r"(\d+)x(\d+)-(\d+)", text)
    if match is None or int(match[1]) < 1 or not 1 <= int(match[2]) <= int(match[3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not COUNTxMIN-MAX, such as 64x60-400")
    return int(match[1]), int(match[2]), int(match[3])
