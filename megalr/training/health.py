"""Decisions from the numbers of an update: skips in a row, spikes, rollbacks.

Plain arithmetic on the host: ranks that are given the same numbers decide the same.
"""

from __future__ import annotations

from typing import Any

from megalr.config.health import HealthConfig
from megalr.errors import AgreedError
from megalr.restarts.spikes import Spike, SpikeWindow


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
