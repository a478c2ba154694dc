"""Restarts of a plain training loop: balanced refactorization and momentum reset."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megalr.config.restarts import Moment, RestartsConfig
from megalr.errors import UserError
from megalr.layers.factors import FactorPair
from megalr.library.pairs import factor_pairs, trained_pairs
from megalr.library.plain_state import PlainState
from megalr.restarts.masters import Group
from megalr.restarts.momentum_reset import Counter, parameters_in_scope
from megalr.restarts.perform import has_moments, perform
from megalr.restarts.refactorize import factor_parameters, largest_imbalance
from megalr.restarts.report import RestartReport
from megalr.restarts.rounds import FactorRounds
from megalr.restarts.schedule import RestartSchedule
from megalr.restarts.transport import check_transport

UNBOUNDED = sys.maxsize
"""Updates of a loop whose length is not given."""


class Restarts:
    """Refactorization and momentum reset of a model with factors under a torch optimizer.

    Call :meth:`step` after every ``optimizer.step()``. When a restart is due it replaces the
    factors of every W = (alpha/r) B A by the balanced ones of the same product, which changes no
    output, and zeroes the optimizer's moments (docs/restarts.md has the algebra). Works on one
    process, under DDP and under FSDP2; there all ranks call it alike, and share the work.

    With ``lr_recovery`` the learning rates of the ``recovery_updates`` updates after a reset are
    below those of the param groups: a hook multiplies ``group["lr"]`` before the optimizer's
    update and puts it back after it, so that any learning-rate scheduler works as without.

    Args:
        model: a model with layers of ``factorize_``, of megalr's decoder, or loaded from a folder
            exported in factorized form; wrapped or not.
        optimizer: built on this model's parameters as they are now.
        every: updates between two restarts; None: see the next two.
        refactorize_every: updates between two refactorizations; None: as ``every``.
        reset_every: updates between two momentum resets; None: as ``every``.
        reset: "zero", or "transport": moments of the factors are carried through refactorizations
            instead, and none are zeroed; AdamW, Muon, NorMuon and Spectron only.
        phase: restarts come after updates phase, phase + period, ...
        start_after: no restart before more than this many updates.
        stop_before: no restart in this many last updates; needs ``total_updates``.
        total_updates: updates of the whole run, if known.
        reset_scope: "all" parameters of the optimizer, or the "factors".
        reset_moments: "first" (averages of gradients), "second" (of their squares) or both.
        reset_counter: the step counter of bias correction after a reset: "zero", "one", "keep".
        lr_recovery: "none", "linear" or "cosine".
        recovery_updates: updates below the scheduled learning rate after a reset.
        imbalance_threshold: also restart when for some matrix ||B'B - AA'|| is more than this share
            of ||B'B|| + ||AA'||; None: never.
        imbalance_every: updates between two measurements of the imbalance.
        process_group: ranks with copies of the model that are not wrapped by DDP.

    Raises:
        UserError: a model without factors, an optimizer without moments, one that was built before
            ``factorize_`` or ``fully_shard``, settings out of range.

    Attributes:
        updates: calls of :meth:`step` so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int | None = None,
        *,
        refactorize_every: int | None = None,
        reset_every: int | None = None,
        reset: Literal["zero", "transport"] = "zero",
        phase: int = 0,
        start_after: int = 0,
        stop_before: int = 0,
        total_updates: int | None = None,
        reset_scope: Literal["all", "factors"] = "all",
        reset_moments: Sequence[Moment] = ("first", "second"),
        reset_counter: Counter = "zero",
        lr_recovery: Literal["none", "linear", "cosine"] = "none",
        recovery_updates: int = 10,
        imbalance_threshold: float | None = None,
        imbalance_every: int = 20,
        process_group: Group = None,
    ) -> None:
        self.config = _checked(
            every=every,
            refactorize_every=refactorize_every,
            reset_every=reset_every,
            reset=reset,
            phase=phase,
            start_after=start_after,
            stop_before=stop_before,
            reset_scope=reset_scope,
            reset_moments=tuple(reset_moments),
            reset_counter=reset_counter,
            lr_recovery=lr_recovery,
            recovery_updates=recovery_updates,
            imbalance_threshold=imbalance_threshold,
            imbalance_every=imbalance_every,
        )
        if stop_before and total_updates is None:
            raise UserError(f"stop_before = {stop_before} counts from the end: give total_updates")
        self.updates = 0
        self._triggered_reset: int | None = None
        self.schedule = RestartSchedule(self.config, total_updates or UNBOUNDED, _constant)
        self._optimizer = _innermost(optimizer)
        pairs = trained_pairs(model, self._optimizer)
        _check(self.config, model, self._optimizer, pairs)
        self._state = PlainState(model, self._optimizer, pairs, process_group)
        self._work: FactorRounds | None = None
        if self.config.refactorizes:
            self._work = FactorRounds(self._state, pairs, with_moments=self.config.transports)
        factors = factor_parameters(pairs)
        self._to_reset = parameters_in_scope(self._state, reset_scope, factors)
        self._scheduled: list[Any] | None = None
        self._hooks: list[Any] = []
        if lr_recovery != "none":
            self._hooks = [
                self._optimizer.register_step_pre_hook(self._lower_rates),
                self._optimizer.register_step_post_hook(self._restore_rates),
            ]

    def step(self) -> RestartReport | None:
        """Count an update, made or skipped, and restart if one is due after it.

        Collective over the ranks that share the model when a restart is due or the imbalance is
        measured. Returns the report of a restart (``megalr/restarts/report.py``), None without one.
        """
        self.updates += 1
        refactorizing = self.schedule.refactorize_due(self.updates)
        resetting = self.schedule.reset_due(self.updates)
        trigger, measured = "period", None
        if not refactorizing and self.schedule.imbalance_due(self.updates):
            assert self._work is not None  # a threshold refactorizes
            measured = largest_imbalance(self._work)
            if self.schedule.imbalanced(measured):
                refactorizing, resetting, trigger = True, self.config.resets, "imbalance"
        if not refactorizing and not resetting:
            return None
        report = perform(
            RestartReport(self.updates, trigger, imbalance=measured),
            self.config,
            self._state,
            self._work if refactorizing else None,
            self._to_reset if resetting else None,
        )
        if report.reset and not report.fraction_reset:
            raise UserError(
                f"{type(self._optimizer).__name__} has no state named "
                f"{', '.join(self._state.moment_names(self.config.reset_moments))} after "
                f"{self.updates} updates: call step() after optimizer.step(), or name its moments "
                'in an attribute moment_names = {"first": (...), "second": (...)}'
            )
        if report.reset and trigger == "imbalance":
            self._triggered_reset = self.updates
        return report

    def learning_rate_factor(self) -> float:
        """Factor of the learning rates in the update to come; 1 without recovery."""
        return self.schedule.learning_rate_factor(self.updates, self._triggered_reset)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and that of the last reset by the imbalance; all else follows from
        these and the arguments."""
        return {"updates": self.updates, "triggered_reset": self._triggered_reset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.updates = int(state["updates"])
        self._triggered_reset = state.get("triggered_reset")

    def close(self) -> None:
        """Remove the hooks from the optimizer; its learning rates are its own again."""
        for hook in self._hooks:
            hook.remove()

    def _lower_rates(self, *_: Any) -> None:
        factor = self.learning_rate_factor()
        if factor == 1.0:
            return
        if self._scheduled is None:  # else the last update raised an error, and was not finished
            self._scheduled = [group["lr"] for group in self._optimizer.param_groups]
        for group, lr in zip(self._optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = lr * factor

    def _restore_rates(self, *_: Any) -> None:
        if self._scheduled is None:
            return
        for group, lr in zip(self._optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = lr
        self._scheduled = None


def _constant(_: int) -> float:
    return 1.0


def _checked(**settings: Any) -> RestartsConfig:
    """The section ``restarts`` with these settings; UserError, in one line, for bad ones."""
    try:
        config = RestartsConfig(**settings)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            where = ".".join(map(str, detail["loc"][:1]))
            text = detail["msg"].removeprefix("Value error, ").replace("Input should", "must")
            value = f"{where} = {detail['input']!r}: " if where else ""
            problems.append(value + text)
        raise UserError(f"Restarts: {'; '.join(problems)}") from None
    if config.reset_scope == "layers":
        raise UserError(
            'Restarts: reset_scope = "layers" is for megalr\'s runs: use "all" or "factors"'
        )
    if not config.active:
        raise UserError(
            "Restarts: nothing to do: give every, refactorize_every, reset_every or "
            "imbalance_threshold"
        )
    return config


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of wrappers such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _check(
    config: RestartsConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: list[FactorPair],
) -> None:
    """Raise UserError for a model and an optimizer that cannot have these restarts."""
    name, inside = type(optimizer).__name__, {id(p) for p in model.parameters()}
    held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    gone = sum(id(p) not in inside for p in held)
    lost = len(pairs) < len(factor_pairs(model))
    if gone and (lost or gone == len(held)):
        raise UserError(
            f"{gone} of the {len(held)} parameters of {name} are not in the model: it was built "
            "before factorize_ or fully_shard replaced them; build the optimizer after these"
        )
    if config.refactorizes and not pairs:
        what = f"no factors among the parameters of {name}" if lost else "no factorized layers"
        raise UserError(
            f"refactorization: {type(model).__name__} has {what}: call factorize_ first, or use "
            "reset_every alone"
        )
    if config.reset_scope == "factors" and not pairs:
        raise UserError('reset_scope = "factors": the optimizer has no factors; use "all"')
    if config.transports:
        check_transport(optimizer, [group["params"] for group in optimizer.param_groups], pairs)
    if config.resets and not has_moments(optimizer, config.reset_moments):
        raise UserError(
            f"{name} has no {' or '.join(config.reset_moments)} moments to reset: use "
            "refactorize_every alone"
        )
