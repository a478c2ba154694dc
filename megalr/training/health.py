"""Decisions from the numbers of an update: skips in a row, spikes, rollbacks.

Plain arithmetic on the host: ranks that are given the same numbers decide the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from megalr.config.health import HealthConfig
from megalr.errors import AgreedError


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

    def metrics(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)


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


class Health:
    """Counts of one run and its two spike windows.

    Args:
        config: the section ``health``.

    Attributes:
        skipped: updates skipped in the run.
        skipped_in_row: updates skipped since the last one that was applied.
        rollbacks: times that the run went back to a checkpoint.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skipped = 0
        self.skipped_in_row = 0
        self.rollbacks = 0
        self._windows: list[SpikeWindow] = []
        if config.spike_threshold is not None:
            self._windows = [
                SpikeWindow(of, config.spike_window, config.spike_threshold)
                for of in ("loss", "gradient_norm")
            ]

    @property
    def decides_before_step(self) -> bool:
        """Whether the loss of an update is needed before its step."""
        return bool(self._windows) and self.config.spike_action == "skip"

    @property
    def decides_after_step(self) -> bool:
        """Whether loss and norm of an update are needed before the next one."""
        return bool(self._windows) and self.config.spike_action in ("reset", "rollback")

    @property
    def may_check_late(self) -> bool:
        """Whether checking an update after the next is launched leads to the same decisions.

        Not if one more skipped update may send the run back.
        """
        first = self.skipped_in_row == 0 and self.config.max_skipped > 1
        return first and not self.decides_after_step

    def count(self, applied: bool) -> bool:
        """Count an update, applied or skipped; True if too many were skipped in a row."""
        if applied:
            self.skipped_in_row = 0
            return False
        self.skipped += 1
        self.skipped_in_row += 1
        return self.skipped_in_row >= self.config.max_skipped

    def spikes(self, **values: float) -> list[Spike]:
        """Enter an update's ``loss``, ``gradient_norm`` or both; those that are spikes."""
        found = [w.observe(values[w.of]) for w in self._windows if w.of in values]
        return [spike for spike in found if spike is not None]

    def count_rollback(self, update: int, reason: str) -> None:
        """Count a rollback after ``update`` updates.

        Raises:
            AgreedError: there were ``health.max_rollbacks`` before.
        """
        if self.rollbacks >= self.config.max_rollbacks:
            raise AgreedError(
                f"{reason} at update {update} after {self.rollbacks} rollbacks "
                f"(health.max_rollbacks {self.config.max_rollbacks}): lower optimizer.lr, inspect "
                "the batches that the skip and rollback events of metrics.jsonl name, or raise "
                "health.max_rollbacks"
            )
        self.rollbacks += 1

    def state_dict(self) -> dict[str, Any]:
        """Counts and windows as plain numbers, for a checkpoint."""
        return {
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "rollbacks": self.rollbacks,
            "windows": {window.of: window.state_dict() for window in self._windows},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.skipped = state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]
        self.rollbacks = state["rollbacks"]
        self._load_windows(state)

    def go_back(self, state: dict[str, Any]) -> None:
        """Continue from an earlier :meth:`state_dict` of this run, but forget no bad update."""
        self.skipped_in_row = 0
        self._load_windows(state)

    def _load_windows(self, state: dict[str, Any]) -> None:
        for window in self._windows:
            window.load_state_dict(state["windows"].get(window.of, []))
