"""Numbers for people: few digits, a unit, a width that hardly changes."""

from __future__ import annotations

import math
import re

WIDTH = 80
"""Columns of a line on the terminal."""


def compact(value: float) -> str:
    """Three digits and a factor of 1000: ``932``, ``4.10k``, ``58.1M``, ``1.31B``, ``15.0T``."""
    if isinstance(value, int) and abs(value) < 1000:
        return str(value)
    text, prefixes = _rounded(value, 3), ["", "k", "M", "B", "T"]
    while len(prefixes) > 1 and 1000 <= abs(float(text)) < math.inf:
        value, prefixes = value / 1000, prefixes[1:]
        text = _rounded(value, 3)
    return text + (prefixes[0] if math.isfinite(value) else "")


def binary_size(number_of_bytes: float) -> str:
    """``421 KiB``, ``1.21 GiB``."""
    value, units = number_of_bytes / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while len(units) > 1 and value >= 999.5:
        value, units = value / 1024, units[1:]
    return f"{_rounded(value, 3)} {units[0]}"


def clock(seconds: float) -> str:
    """``0:48``, ``1:02:03``, from 100 hours on ``4d 04h``; ``?`` if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    hours, rest = divmod(round(max(0.0, seconds)), 3600)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02}h"
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def took(seconds: float) -> str:
    """A time spent: ``0.03 s``, ``12.3 s``, from a minute on as :func:`clock`."""
    if seconds >= 59.95 or not math.isfinite(seconds):
        return clock(seconds)
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"


def loss_text(value: float) -> str:
    """Nats with three decimals: ``6.670``; large ones with four digits."""
    return f"{value:.3f}" if abs(value) < 100 else _rounded(value, 4)


def four_digits(value: float) -> str:
    """``123.4``, ``32.40``, ``1.235e6``."""
    return _rounded(value, 4)


def scientific(value: float) -> str:
    """Two digits and an exponent: ``1.4e-3``; ``0`` for zero."""
    return _exponent(f"{value:.1e}") if value else "0"


def clip(text: str, width: int = WIDTH) -> str:
    """The text on one line, cut to ``width`` columns; the cut is marked by ``...``."""
    line = " ".join(text.splitlines())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _rounded(value: float, digits: int) -> str:
    """That many significant digits, also if the last ones are zeros."""
    return _exponent(f"{value:#.{digits}g}").rstrip(".")


def _exponent(text: str) -> str:
    """``1.4e-03`` as ``1.4e-3``."""
    return re.sub(r"e([+-])0*(\d+)", lambda m: f"e{m[1].strip('+')}{m[2]}", text)
