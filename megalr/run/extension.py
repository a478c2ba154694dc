"""The learning rate of a run whose schedule or length changes on the way.

A schedule is a function of the update and of the run's length N. If a run that has made E updates
is resumed with another N, there are three ways on (``schedule.on_extend``), with f the factor of
the peak until then and q the new ``min_lr_ratio``:

* ``rescale``: the schedule of the new length, as if the run had been planned so
* ``hold``: f(t) before E, then f(E - 1)
* ``decay``: f(t) before E, then f(E - 1) + (q - f(E - 1)) (t - E) / (N - E), at most to q

The checkpoints of such a run hold how it was extended (``state.json``), so that it is resumed
bitwise and can be extended again.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from megalr.checkpoint.directory import CHECKPOINTS
from megalr.checkpoint.fork import Fork
from megalr.checkpoint.manifest import Damaged, first_problem
from megalr.checkpoint.source import EXTENSIONS, SavedState
from megalr.config.schedules import ScheduleConfig
from megalr.config.schema import RunConfig
from megalr.distributed.agreement import is_rank0, run_on_all
from megalr.optim.schedules import Schedule, make_schedule


class _Extension(BaseModel, strict=True, extra="forbid"):
    """One change of the length: made after ``update`` updates, to ``updates`` in all."""

    update: PositiveInt
    on_extend: Literal["hold", "decay"]
    updates: PositiveInt
    min_lr_ratio: float


class _History(BaseModel):
    """The schedule that a run began with, and its extensions in their order."""

    model_config = ConfigDict(strict=True, extra="forbid")

    schedule: ScheduleConfig
    updates: NonNegativeInt
    extensions: list[_Extension]

    def factor(self) -> Schedule:
        """The factor of the peak learning rate at update t."""
        found = make_schedule(self.schedule, self.updates)
        for extension in self.extensions:
            found = _extended(found, extension)
        return found


@dataclass(frozen=True)
class SchedulePlan:
    """The learning rates of this start of a run.

    Attributes:
        factor: of the peak learning rate at update t.
        history: what checkpoints must hold for it; None if it follows from the configuration.
        changed: fields of the ``resume`` or ``fork`` event about them.
        notes: lines for the console.
    """

    factor: Schedule
    history: dict[str, Any] | None = None
    changed: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def plan_schedule(config: RunConfig, tag: str | None, fork: Fork | None) -> SchedulePlan:
    """The plan of a run that starts, resumes from checkpoint ``tag``, or forks; tells the user.

    Collective: every rank reads the checkpoint's ``state.json``.

    Raises:
        UserError: it cannot be read.
    """
    folder = Path(config.run.dir)
    saved = None if fork is None or fork.weights_only else fork.saved
    if tag is not None:
        saved = run_on_all(lambda: SavedState.read(folder / CHECKPOINTS / tag), Damaged)
    if saved is None:
        return SchedulePlan(make_schedule(config.schedule, config.train.updates))
    before = saved
    plan = run_on_all(lambda: continued_plan(config, before, fork is not None), Damaged)
    if is_rank0() and plan.notes:
        print("\n".join(plan.notes), flush=True)
    return plan


def continued_plan(config: RunConfig, saved: SavedState, forked: bool = False) -> SchedulePlan:
    """The plan of a run that continues from a saved state, its own or (``forked``) another run's.

    A fork always has the schedule of its own configuration.

    Raises:
        Damaged: the state holds no configuration, or no extensions, of this version.
    """
    old = saved.run_config()
    history = None if forked else _history(saved)
    update, total, earlier = saved.update, config.train.updates, old.train.updates
    new = make_schedule(config.schedule, total)
    if not forked and total == earlier and _plain(config) == _plain(old):
        notes = _finished(config, saved)
        if history is None:
            return SchedulePlan(new, notes=notes)
        return SchedulePlan(history.factor(), history.model_dump(mode="json"), notes=notes)
    if history is None:
        history = _History(schedule=old.schedule, updates=earlier, extensions=[])
    before, now, choice = history.factor(), new, "rescale"
    if not forked and total != earlier and 0 < update < total:
        choice = getattr(config.schedule, "on_extend", choice)
    if choice != "rescale":
        floor = config.schedule.min_lr_ratio
        step = {"update": update, "on_extend": choice, "updates": total, "min_lr_ratio": floor}
        history.extensions.append(_Extension.model_validate(step))
        now = history.factor()
    peak = config.optimizer.lr
    rates = [old.optimizer.lr * before(update), peak * new(update), peak * now(update)]
    if forked:
        notes = _notes(config, update, [earlier, total], None, rates)
        return SchedulePlan(new, None, {"learning_rates": rates[:2]}, notes)
    changed = {"updates": [earlier, total], "on_extend": choice, "learning_rates": rates}
    stored = None if choice == "rescale" else history.model_dump(mode="json")
    notes = [] if update >= total else _notes(config, update, [earlier, total], choice, rates)
    return SchedulePlan(now, stored, {"extended": changed}, notes)


def _extended(before: Schedule, extension: _Extension) -> Schedule:
    start, total = extension.update, extension.updates
    last = before(start - 1)
    end = last if extension.on_extend == "hold" else extension.min_lr_ratio

    def factor(t: int) -> float:
        if t < start:
            return before(t)
        return last + (end - last) * min(1.0, (t - start) / max(1, total - start))

    return factor


def _history(saved: SavedState) -> _History | None:
    content = saved.state.get(EXTENSIONS)
    if content is None:
        return None
    try:
        return _History.model_validate(content)
    except ValidationError as error:
        raise Damaged(f"state.json: {EXTENSIONS}: {first_problem(error)}") from error


def _plain(config: RunConfig) -> dict[str, Any]:
    """What the learning rates follow from, beside the length."""
    return config.schedule.model_dump(exclude={"on_extend"})


def _notes(
    config: RunConfig, update: int, updates: list[int], choice: str | None, rates: list[float]
) -> list[str]:
    """Lines about a learning rate that another schedule or length changes; none if it does not.

    ``choice``: of ``schedule.on_extend``; None for a fork.
    """
    (old, new, now), (earlier, total) = rates, updates
    if choice in (None, "rescale") and abs(old - new) <= 1e-9 * max(old, new):
        return []
    what = f"train.updates {earlier} -> {total}" if total != earlier else "another schedule"
    notes = [
        f"warning: {what}: at update {update} the learning rate is {old:.4g} by the old schedule "
        f"and {new:.4g} by the new one"
    ]
    if choice == "hold":
        notes.append(f"  schedule.on_extend=hold: it stays at {now:.4g}")
    elif choice == "decay":
        end = config.optimizer.lr * config.schedule.min_lr_ratio
        notes.append(
            f"  schedule.on_extend=decay: it goes from {now:.4g} along a line to {end:.4g}"
        )
    elif choice is not None and total != earlier and hasattr(config.schedule, "on_extend"):
        notes.append(
            "  schedule.on_extend=hold would keep the last one instead; schedule.on_extend=decay "
            "would lower it from there to min_lr_ratio at the new end"
        )
    return notes


def _finished(config: RunConfig, saved: SavedState) -> list[str]:
    """The line about a run that has nothing left to do."""
    total = config.train.updates
    if saved.update < total or saved.state.get("evaluation_pending"):
        return []
    folder = shlex.quote(config.run.dir)
    choice = " schedule.on_extend=hold" if hasattr(config.schedule, "on_extend") else ""
    return [
        f"run.dir {config.run.dir} is already finished ({total} updates); to extend: megalr train "
        f"--resume {folder} --allow train.updates train.updates={2 * total}{choice}"
    ]
