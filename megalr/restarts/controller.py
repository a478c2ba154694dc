"""Restarts of a run: refactorization and momentum reset after the updates where they are due.

Order within an update: step, restart if due, evaluate, save. A checkpoint is therefore always taken
after the restart, and periodic restarts need no saved state: they are a function of the update
number and the configuration. The exception is the last update of a run: nothing would be trained
after a restart there, so it is deferred, and made when a longer run resumes from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalr.config.restarts import RestartsConfig
from megalr.distributed.agreement import all_reduce_max
from megalr.engine.state import EngineState
from megalr.errors import UserError
from megalr.layers.factors import FactorPair
from megalr.restarts.momentum_reset import check_groups, parameters_in_scope
from megalr.restarts.perform import has_moments, now, perform
from megalr.restarts.refactorize import factor_parameters, largest_imbalance
from megalr.restarts.report import RestartReport
from megalr.restarts.rounds import FactorRounds
from megalr.restarts.schedule import BaseSchedule, RestartSchedule
from megalr.restarts.spikes import SpikeDetector
from megalr.restarts.transport import check_transport
from megalr.restarts.verify import verify_weights


class Restarts:
    """Refactorization and momentum reset of one run; create it on all ranks after the engine.

    Args:
        config: the section ``restarts``.
        engine: the engine, on every rank.
        pairs: the model's factorized matrices (``model.factor_pairs()``); empty for a dense one.
        total_updates: updates of the whole run.
        base_schedule: factor of the peak learning rate at update t (zero-based).

    Raises:
        UserError: a combination that cannot work with this model, optimizer or engine.

    Attributes:
        seconds: time spent in restarts and in measuring the imbalance so far on this rank.
    """

    def __init__(
        self,
        config: RestartsConfig,
        engine: Any,
        pairs: Sequence[FactorPair],
        total_updates: int,
        base_schedule: BaseSchedule,
    ) -> None:
        self.config = config
        self.schedule = RestartSchedule(config, total_updates, base_schedule)
        self.seconds = 0.0
        self._triggered_reset: int | None = None
        self._deferred: dict[str, Any] | None = None
        self._spikes: SpikeDetector | None = None
        if config.gradient_norm_spike is not None:
            self._spikes = SpikeDetector(config.gradient_norm_spike, config.spike_window)
        if not config.active:
            return
        _check_factors(config, pairs)
        self._state = EngineState(engine)
        self._factors = factor_parameters(pairs)
        scope = config.reset_scope
        self._to_reset = parameters_in_scope(self._state, scope, self._factors)
        if config.resets:
            _check_moments(config, self._state.base)
            check_groups(self._state, self._to_reset, config.reset_counter, scope)
        if config.refactorizes:
            self._work = FactorRounds(self._state, pairs, with_moments=config.transports)
        if config.transports:
            check_transport(self._state.base, self._state.groups(), pairs)

    def learning_rate_factor(self, t: int) -> float:
        """Factor of the peak learning rate at update t (zero-based; t updates are done)."""
        return self.schedule.learning_rate_factor(t, self._triggered_reset)

    def due(self, update: int) -> bool:
        """Whether :meth:`after_update` has something to measure or to do after this update."""
        return self.config.active and (
            self._spikes is not None
            or self._is_last(update)
            or self.schedule.refactorize_due(update)
            or self.schedule.reset_due(update)
            or self.schedule.imbalance_due(update)
        )

    def after_update(
        self, update: int, gradient_norm: Tensor | float | None = None
    ) -> RestartReport | None:
        """Restart if one is due after ``update`` updates; every rank calls it then (:meth:`due`).

        ``gradient_norm`` is that of the update just made; needed with gradient_norm_spike only.
        Returns None if nothing was done. With ``verify`` raises RuntimeError when weights differ
        between ranks afterwards.
        """
        if not self.config.active:
            return None
        spike = self._is_spike(update, gradient_norm)
        if self._is_last(update):
            self._deferred = {"update": update, "spike": spike}
            return None
        return self._restart_if_due(update, spike)

    def after_load(self) -> RestartReport | None:
        """To be called on all ranks when engine and this have loaded a checkpoint.

        Repairs access to optimizer states, which an in-process load breaks, and makes the restart
        that was deferred if the checkpoint is the last one of a shorter run.
        """
        if not self.config.active:
            return None
        self._state.relink()
        if self._deferred is None or self._is_last(self._deferred["update"]):
            return None
        deferred, self._deferred = self._deferred, None
        return self._restart_if_due(deferred["update"], deferred["spike"])

    def state_dict(self) -> dict[str, Any]:
        """State of the adaptive triggers and a deferred restart; plain values for a checkpoint."""
        spikes = None if self._spikes is None else self._spikes.state_dict()
        return {
            "triggered_reset": self._triggered_reset,
            "spikes": spikes,
            "deferred": self._deferred,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; checkpoints of older versions defer nothing."""
        self._triggered_reset = state["triggered_reset"]
        self._deferred = state.get("deferred")
        if self._spikes is not None and state["spikes"] is not None:
            self._spikes.load_state_dict(state["spikes"])

    def _restart_if_due(self, update: int, spike: bool) -> RestartReport | None:
        refactorizing = self.schedule.refactorize_due(update)
        resetting = self.schedule.reset_due(update)
        trigger, measured = "period", None
        if spike and self.schedule.in_window(update) and not resetting:
            resetting, trigger = True, "gradient_norm"
        if not refactorizing and self.schedule.imbalance_due(update):
            started = now(self._state.device)
            measured = largest_imbalance(self._work)
            self.seconds += now(self._state.device) - started
            if self.schedule.imbalanced(measured):
                refactorizing, resetting, trigger = True, self.config.resets, "imbalance"
        if not refactorizing and not resetting:
            return None
        report = RestartReport(update, trigger, imbalance=measured)
        return self._restart(report, refactorizing, resetting)

    def _restart(
        self, report: RestartReport, refactorizing: bool, resetting: bool
    ) -> RestartReport:
        config = self.config
        work = self._work if refactorizing else None
        report = perform(report, config, self._state, work, self._to_reset if resetting else None)
        if report.reset and not self.schedule.reset_due(report.update):
            self._triggered_reset = report.update
        self.seconds += report.refactorize_seconds + report.reset_seconds
        if config.verify and report.refactorized:
            verify_weights(self._state, self._state.parameters())
            report = replace(report, verified=True)
        return report

    def _is_last(self, update: int) -> bool:
        return update >= self.schedule.total_updates

    def _is_spike(self, update: int, gradient_norm: Tensor | float | None) -> bool:
        if self._spikes is None:
            return False
        if gradient_norm is None:
            raise ValueError("restarts.gradient_norm_spike needs the gradient norm of every update")
        norm = all_reduce_max(float(gradient_norm), self._state.device)
        return self._spikes.observe(update, norm)


def _check_factors(config: RestartsConfig, pairs: Sequence[FactorPair]) -> None:
    if pairs:
        return
    if config.refactorizes:
        key = "refactorize_every" if config.refactorize_every is not None else "every"
        if config.refactorize_period is None:
            key = "imbalance_threshold"
        raise UserError(
            f"restarts.{key} = {getattr(config, key)} asks for refactorization, but this model has "
            "no factors: use restarts.reset_every alone, or a method that has factors (low_rank)"
        )
    if config.reset_scope == "factors":
        raise UserError(
            "restarts.reset_scope = factors, but this model has no factors: use all or layers"
        )


def _check_moments(config: RestartsConfig, optimizer: torch.optim.Optimizer) -> None:
    """Reject what is known before the first update; the reset itself checks the rest."""
    if not has_moments(optimizer, config.reset_moments):
        raise UserError(
            f"restarts.reset_moments = {', '.join(config.reset_moments)}: the optimizer "
            f"{type(optimizer).__name__} has no such moments; use restarts.refactorize_every alone"
        )
