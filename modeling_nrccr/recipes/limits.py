"""Which numbers an option takes: those that would do nothing, or harm, are refused where they are read."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping


def number(least: float, most: float | None = None, kind: type = int) -> Callable[[str], float]:
    """Return the `type` of an option of argparse: a number from `least` to `most` (None: any above)."""

    def read(text: str) -> float:
        value = kind(text)
        if not value >= least or (most is not None and value > most):
            raise ArgumentTypeError(f"{text} is no number from {least}" + (f" to {most}" if most is not None else ""))
        return value

    read.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid whole number value: 'x'"
    return read


def check_numbers(options: object, least: Mapping[str, float], above: Mapping[str, float] | None = None):
    """Raise ValueError for a number of `options` that is less than `least`, or not more than `above`."""
    for limits, word in ((least, "at least"), (above or {}, "above")):
        for name, limit in limits.items():
            value = getattr(options, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not (value > limit if word == "above" else value >= limit):
                raise ValueError(f"{name}={value}: it must be {word} {limit}")
