"""When restarts are due and their effect on the learning rate: functions of the configuration.

Two counts are used throughout: ``done`` is the number of updates made (a restart comes after an
update, so it is due at some ``done`` >= 1), ``t`` is the zero-based number of an update about to be
made. The first update after a restart at ``done`` = u has t = u.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megalr.config.restarts import RestartsConfig

BaseSchedule = Callable[[int], float]

# Learning rate right after a published restart, as a share of the target (METHODS: the scheduler
# "cosine_quick_recovery" of the code of arXiv 2505.22922).
_PUBLISHED_FLOOR = 0.001


class RestartSchedule:
    """The restarts of a run of ``total_updates`` and its learning-rate factor.

    Args:
        config: the section ``restarts``.
        total_updates: N, updates of the whole run.
        base: factor of the peak learning rate at update t without restarts.
    """

    def __init__(self, config: RestartsConfig, total_updates: int, base: BaseSchedule) -> None:
        self.config = config
        self.total_updates = total_updates
        self.base = base

    def refactorize_due(self, done: int) -> bool:
        """Whether the period asks for a refactorization after ``done`` updates."""
        return self._due(self.config.refactorize_period, done)

    def reset_due(self, done: int) -> bool:
        """Whether the period asks for a momentum reset after ``done`` updates."""
        return self._due(self.config.reset_period, done)

    def in_window(self, done: int) -> bool:
        """Whether ``start_after`` and ``stop_before`` allow a restart after ``done`` updates."""
        config = self.config
        return config.start_after < done <= self.total_updates - config.stop_before

    def imbalance_due(self, done: int) -> bool:
        """Whether the imbalance is to be measured after ``done`` updates."""
        config = self.config
        return (
            config.imbalance_threshold is not None
            and done % config.imbalance_every == 0
            and self.in_window(done)
        )

    def imbalanced(self, measured: float) -> bool:
        """Whether the largest imbalance of all matrices, between 0 and 1, asks for a restart."""
        threshold = self.config.imbalance_threshold
        return threshold is not None and measured > threshold

    def learning_rate_factor(self, t: int, triggered_reset: int | None = None) -> float:
        """Factor of the peak learning rate at update t.

        ``triggered_reset``: updates done at the last reset by an adaptive trigger, if any.

        Without recovery it is ``base(t)``. With it, ``base(t)`` times a ramp over the R updates
        that follow a reset at u: with x = (t - u + 1) / (R + 1) the ramp is x (linear) or
        (1 - cos(pi x)) / 2 (cosine), so exactly R updates are below the schedule.
        """
        if self.config.compat == "published":
            return self._published(t)
        if self.config.lr_recovery == "none":
            return self.base(t)
        resets = (self._last_reset(t), triggered_reset)
        last = max((u for u in resets if u is not None and u <= t), default=None)
        if last is None:
            return self.base(t)
        x = min(1.0, (t - last + 1) / (self.config.recovery_updates + 1))
        ramp = x if self.config.lr_recovery == "linear" else 0.5 * (1.0 - math.cos(math.pi * x))
        return self.base(t) * ramp

    def _due(self, period: int | None, done: int) -> bool:
        if period is None or not self.in_window(done):
            return False
        return done % period == self.config.phase

    def _last_reset(self, t: int) -> int | None:
        """The latest ``done`` <= t at which a reset was due."""
        period = self.config.reset_period
        if period is None:
            return None
        latest = min(t, self.total_updates - self.config.stop_before)
        latest -= (latest - self.config.phase) % period
        return latest if latest > self.config.start_after else None

    def _published(self, t: int) -> float:
        """The published factor: ``base(t)`` before the first restart, from then on the
        quick-recovery factor of t + 1, because its scheduler is rebuilt one step ahead."""
        period = self.config.reset_period
        if period is None or t < period:
            return self.base(t)
        # Where the period does not divide the run the published scheduler uses the run's length
        # instead, without a warning, while its loop goes on restarting: no recovery.
        cycle = period if self.total_updates % period == 0 else self.total_updates
        steps = self.config.recovery_updates
        start, past = divmod(t + 1, cycle)
        if past >= steps:
            return self.base(t + 1)
        target = self.base(cycle * start + steps)
        share = 1.0 if steps == 1 else min(1.0, past / (steps - 1))
        return target * (_PUBLISHED_FLOOR + (1.0 - _PUBLISHED_FLOOR) * share)
