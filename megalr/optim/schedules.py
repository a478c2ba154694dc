"""Learning-rate factors as pure functions of the update number (METHODS: arXiv 2505.22922 code)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = Callable[[int], float]
"""Maps a zero-based update number t to the factor of the peak learning rate at that update."""


def make_schedule(settings: Any, total_updates: int) -> Schedule:
    """The factor lambda(t) for t = 0 .. total_updates - 1.

    With w = ``warmup_updates``, q = ``min_lr_ratio``, N = ``total_updates`` and
    p = (t - w) / max(1, N - w):

    * t < w: t / w, so the first update of a warm-up has factor 0 and changes nothing, as in the
      published runs
    * ``cosine``: q + (1 - q) (1 + cos(pi p)) / 2
    * ``linear``: q + (1 - q) (1 - p)
    * ``constant``: 1
    """
    warmup: int = settings.warmup_updates
    floor: float = settings.min_lr_ratio
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
        "linear": lambda p: 1.0 - p,
        "constant": lambda p: 1.0,
    }
    shape = shapes[settings.name]

    def factor(t: int) -> float:
        if t < warmup:
            return t / warmup
        progress = min(1.0, (t - warmup) / max(1, total_updates - warmup))
        return floor + (1.0 - floor) * shape(progress)

    return factor
