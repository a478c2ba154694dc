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
    * ``wsd``: see :func:`warmup_stable_decay`
    * ``cosine_restarts``: ReLoRA's, see :func:`cosine_restarts`
    """
    if settings.name == "cosine_restarts":
        return cosine_restarts(settings, total_updates)
    if settings.name == "wsd":
        return warmup_stable_decay(settings, total_updates)
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


def warmup_stable_decay(settings: Any, total_updates: int) -> Schedule:
    """WSD (MiniCPM, arXiv 2404.06395; ``1-sqrt``: arXiv 2405.18392).

    With D = ``decay_updates`` and p = (t - (N - D)) / D, the decay's progress, at most 1:

    * t < w: t / w
    * t < N - D: 1
    * else q + (1 - q) s(p) with s(p) = 1 - p (``linear``), (1 + cos(pi p)) / 2 (``cosine``) or
      1 - sqrt(p) (``1-sqrt``)
    """
    warmup, floor, decay = settings.warmup_updates, settings.min_lr_ratio, settings.decay_updates
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda p: 1.0 - p,
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
        "1-sqrt": lambda p: 1.0 - math.sqrt(p),
    }
    shape = shapes[settings.decay_type]
    start = total_updates - decay

    def factor(t: int) -> float:
        if t < warmup:
            return t / warmup
        if t < start or decay == 0:
            return 1.0
        return floor + (1.0 - floor) * shape(min(1.0, (t - start) / decay))

    return factor


def cosine_restarts(settings: Any, total_updates: int) -> Schedule:
    """ReLoRA's jagged cosine (arXiv 2307.05695).

    With C = ``cycle_updates``, w2 = ``restart_warmup_updates``, tau = t + ``adjust_updates``,
    d = tau mod C, n = tau div C and c the cosine from 1 to the floor:

    * t < w: t / w
    * d < w2 and t >= C: d / w2 * c((n C + w2 - w) / (N - w)), a ramp to the cosine's value there
    * else c((tau - w) / (N - w))
    """
    warmup, floor = settings.warmup_updates, settings.min_lr_ratio
    cycle, ramp = settings.cycle_updates, settings.restart_warmup_updates
    span = max(1, total_updates - warmup)

    def cosine(progress: float) -> float:
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def factor(t: int) -> float:
        if t < warmup:
            return t / warmup
        shifted = t + settings.adjust_updates
        number, done = divmod(shifted, cycle)
        if done < ramp and t >= cycle:
            return done / ramp * cosine((number * cycle + ramp - warmup) / span)
        return cosine((shifted - warmup) / span)

    return factor
