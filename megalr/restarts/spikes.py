"""Spikes: a loss or gradient norm far above those before it.

:class:`SpikeWindow` judges the health of a run (``health.spike_*``). :class:`SpikeDetector`
triggers restarts that no period asks for (``restarts.gradient_norm_spike``,
off by default: whether restarts should be periodic is an open question of arXiv 2505.22922).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spike:
    """A value far above those before it; the fields of the ``spike`` event.

    Attributes:
        of: loss or gradient_norm.
        value: of this update.
        mean: of the window before.
        deviations: distance from the mean in standard deviations of the window.
    """

    of: str
    value: float
    mean: float
    deviations: float


class SpikeWindow:
    """Compares a value with the ``window`` finite values before it.

    A spike is more than ``threshold`` standard deviations (of a sample) above the mean, with at
    least half a window of values. Spikes enter the window as well, so that a lasting rise becomes
    normal after a while instead of remaining a spike.
    """

    def __init__(self, of: str, window: int, threshold: float) -> None:
        self.of = of
        self.window = window
        self.threshold = threshold
        self._values: deque[float] = deque(maxlen=window)

    def observe(self, value: float) -> Spike | None:
        """Enter a value into the window; the spike if it is one."""
        if not math.isfinite(value):
            return None
        spike = None
        if len(self._values) >= max(2, self.window // 2):
            mean, deviation = _mean_and_deviation(self._values)
            if value > mean + self.threshold * deviation:
                above = (value - mean) / deviation if deviation else math.inf
                spike = Spike(self.of, value, mean, above)
        self._values.append(value)
        return spike

    def state_dict(self) -> list[float]:
        """The values, oldest first; plain numbers for a checkpoint."""
        return list(self._values)

    def load_state_dict(self, values: list[float]) -> None:
        """Continue from :meth:`state_dict`; a shorter window keeps the newest values."""
        self._values = deque(values, maxlen=self.window)


def _mean_and_deviation(values: Collection[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the module ``statistics`` takes 60 times as long."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


class SpikeDetector:
    """Detects a gradient norm of more than ``ratio`` times its recent median.

    The median is over the last ``window`` finite norms before the present one, of which at least
    half must be there. After a spike none is reported for ``window`` updates, so a lasting rise
    becomes the new median instead of a reset at every update. (:class:`SpikeWindow` reports every
    spike, because each of them costs one update, not all moments.)
    """

    def __init__(self, ratio: float, window: int) -> None:
        self.ratio = ratio
        self.window = window
        self._norms: deque[float] = deque(maxlen=window)
        self._quiet_until = 0

    def observe(self, update: int, norm: float) -> bool:
        """Record the norm of an update; True if it is a spike."""
        if not math.isfinite(norm):  # the health check's business
            return False
        enough = len(self._norms) >= self.window // 2
        spike = (
            enough
            and update >= self._quiet_until
            and norm > self.ratio * statistics.median(self._norms)
        )
        self._norms.append(norm)
        if spike:
            self._quiet_until = update + self.window
        return spike

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"norms": list(self._norms), "quiet_until": self._quiet_until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; a shorter window keeps the newest norms."""
        self._norms = deque(state["norms"], maxlen=self.window)
        self._quiet_until = state["quiet_until"]
