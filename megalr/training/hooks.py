"""What is done after some updates, in the order ReLoRA, restarts, log line, evaluation, checkpoint.

So a checkpoint is always after the restart, and resuming from it repeats nothing and skips nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.checkpoint.save import save_checkpoint
from megalr.checkpoint.source import WORKING_DIRECTORY
from megalr.data.loader import EvaluationBatches, MicroBatch
from megalr.distributed.agreement import raise_on_any_rank
from megalr.engine.build import ranks_of_batches
from megalr.evaluation.perplexity import Evaluation, evaluate
from megalr.models.flops import flops_per_token
from megalr.restarts.controller import Restarts
from megalr.restarts.relora import Relora
from megalr.run.environment import peak_flops
from megalr.training.context import RunContext
from megalr.training.device import peak_memory_gib, wait_for
from megalr.training.step import StepResult
from megalr.training.step_log import PendingLog


class Hook(ABC):
    """Something that is done after some updates; every rank calls it after the same ones.

    Attributes:
        deferrable: :meth:`after_step` may come after the next update has been launched, if
            :meth:`prefetch` is called before that.
        pending: the run is not finished without it, although all updates are made.
    """

    deferrable = False
    pending = False

    @abstractmethod
    def due(self, update: int) -> bool:
        """Whether :meth:`after_step` has something to do when ``update`` updates are done."""

    @abstractmethod
    def after_step(self, result: StepResult) -> None:
        """Do it."""

    def prefetch(self) -> None:  # noqa: B027
        """Start what :meth:`after_step` will wait for."""

    def at_start(self) -> None:  # noqa: B027
        """Before the first update of this start."""

    def at_stop(self) -> None:  # noqa: B027
        """After the last update of a run that stops before its end."""

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint's state; plain values."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Continue from a checkpoint's state, when the engine has loaded the checkpoint."""


class ReloraHook(Hook):
    """Merges the factors into the frozen weights (event ``merge``)."""

    def __init__(self, run: RunContext, relora: Relora) -> None:
        self.run, self.relora = run, relora

    def due(self, update: int) -> bool:
        return self.relora.due(update)

    def after_step(self, result: StepResult) -> None:
        merge = self.relora.after_update(result.update)
        if merge is not None:
            self.run.metrics.write("merge", result.update, **merge.metrics())
            self.run.stopwatch.exclude(merge.merge_seconds)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.relora.state.relink()


class RestartsHook(Hook):
    """Refactorizes and resets moments (event ``restart``)."""

    def __init__(self, run: RunContext, restarts: Restarts) -> None:
        self.run, self.restarts = run, restarts

    def due(self, update: int) -> bool:
        return self.restarts.due(update)

    def after_step(self, result: StepResult) -> None:
        before = self.restarts.seconds
        report = self.restarts.after_update(result.update, result.norm)
        if report is not None:
            self.run.metrics.write("restart", result.update, **report.metrics())
            self.run.stopwatch.exclude(self.restarts.seconds - before)

    def state_dict(self) -> dict[str, Any]:
        return {"restarts": self.restarts.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.restarts.load_state_dict(saved["restarts"])
        report = self.restarts.after_load()
        if report is not None:  # deferred at the end of a shorter run
            self.run.metrics.write("restart", report.update, **report.metrics())


class LogHook(Hook):
    """Writes a line of metrics about the updates since the last one (event ``step``).

    Args:
        run: the run.
        visible: as for :func:`flops_per_token`.

    Attributes:
        train_seconds: time of the updates so far, without evaluation, saving and restarts.
    """

    deferrable = True

    def __init__(self, run: RunContext, visible: float | None = None) -> None:
        self.run = run
        self.train_seconds = 0.0
        self._line: PendingLog | None = None
        self._flops_per_token = flops_per_token(
            run.decoder, run.config.data.sequence_length, visible
        )
        self._peak_flops = peak_flops(run.device, run.config.train.precision)

    def due(self, update: int) -> bool:
        return update == self.run.total_updates or _reached(update, self.run.config.log.every)

    def prefetch(self) -> None:
        self._line = self.run.close_window()

    def after_step(self, result: StepResult) -> None:
        line, self._line = self._line or self.run.close_window(), None
        self._write(line)

    def at_stop(self) -> None:
        if self.run.window.results:
            self._write(self.run.close_window())

    def _write(self, line: PendingLog) -> None:
        """Wait for the numbers of a line and write it."""
        run = self.run
        run.settle(line.metrics)
        seconds, update = line.seconds(), line.window.results[-1].update
        self.train_seconds += seconds
        numbers = line.window.numbers(seconds)
        flops = numbers["tokens_per_second"] * self._flops_per_token / dist.get_world_size()
        run.metrics.write(
            "step",
            update,
            **numbers,
            tokens=line.tokens,
            mfu=flops / self._peak_flops if self._peak_flops else "n/a",
            peak_memory_gib=peak_memory_gib(run.device, run.config.train.cuda_graphs),
            eta_seconds=numbers["step_seconds"] * (run.total_updates - update),
        )


class EvaluationHook(Hook):
    """Evaluates on the validation sets (events ``eval`` for the first, ``eval_further``).

    An evaluation that a stop prevented or interrupted is made first when the run continues.

    Args:
        run: the run.
        batches: the fixed batches of every validation set by its name, iterable repeatedly, during
            the run (False) and after the last update (True).
    """

    def __init__(
        self, run: RunContext, batches: Mapping[str, Mapping[bool, EvaluationBatches]]
    ) -> None:
        self.run, self.batches = run, batches
        self._last: tuple[int, float | None] = (0, None)  # update and loss of the last evaluation

    def due(self, update: int) -> bool:
        reached = _reached(update, self.run.config.evaluation.every)
        return bool(self.batches) and (update == self.run.total_updates or reached)

    def at_start(self) -> None:
        if self.pending:
            self._evaluate()

    def after_step(self, result: StepResult) -> None:
        self.pending = True
        self._evaluate()

    def loss_after(self, update: int) -> float | None:
        """Loss on the first set after ``update`` updates; None if it was not evaluated then."""
        evaluated, loss = self._last
        return loss if evaluated == update else None

    def _evaluate(self) -> None:
        """Evaluate and report it, unless the run is to stop."""
        run, update = self.run, self.run.progress.update
        if not self.batches or run.stop.requested(now=True):
            return
        wait_for(run.device)
        group = ranks_of_batches(run.engine)
        found: dict[str, Evaluation] = {}
        for name, by_time in self.batches.items():
            batches = by_time[update >= run.total_updates]
            evaluation = evaluate(run.decoder, self._until_stopped(batches), run.device, group)
            raise_on_any_rank(batches.error)
            run.stopwatch.exclude(evaluation.eval_seconds)
            if run.stop.requested(now=True):
                return
            found[name] = evaluation
        (name, first), *further = found.items()
        named = {"validation": name} if name else {}
        run.metrics.write("eval", update, **named, **asdict(first))
        for name, evaluation in further:
            run.metrics.write("eval_further", update, validation=name, **asdict(evaluation))
        self._last = (update, first.loss)
        self.pending = False

    def _until_stopped(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches, ending early, on all ranks at the same one, when the run is to stop."""
        for batch in batches:
            yield batch
            self.run.watchdog.progress(f"evaluating after update {self.run.progress.update}")
            if self.run.stop.requested():
                return

    def state_dict(self) -> dict[str, Any]:
        return {"evaluation_pending": self.pending}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.pending = saved["evaluation_pending"] and bool(self.batches)
        self._last = (0, None)


class CheckpointHook(Hook):
    """Saves a checkpoint (event ``checkpoint``), also before a stop.

    Args:
        run: the run.
        evaluation: knows the validation loss of the model being saved.
        hooks: those whose state is saved.
        identity: further plain values to save.
        save_first: save before the first update: a fork no longer needs its source then.
    """

    def __init__(
        self,
        run: RunContext,
        evaluation: EvaluationHook,
        hooks: Sequence[Hook],
        identity: dict[str, Any],
        save_first: bool = False,
    ) -> None:
        self.run, self.evaluation, self.save_first = run, evaluation, save_first
        self.hooks, self.identity = hooks, identity

    def due(self, update: int) -> bool:
        # Not among skipped updates: the newest checkpoint is where a rollback goes.
        wanted, last = self.run.config.checkpoint, update == self.run.total_updates
        periodic = _reached(update, wanted.every) and not self.run.health.skipped_in_row
        return (last and wanted.at_end) or periodic or self.run.stop.reason is not None

    def at_start(self) -> None:
        update = self.run.progress.update
        ended = update == self.run.total_updates and self.evaluation.loss_after(update) is not None
        if ended or self.save_first:  # a run that ended is saved again, with no evaluation pending
            self.save()

    def after_step(self, result: StepResult) -> None:
        self.save()
        self.run.stop.requested(now=True)

    def save(self) -> None:
        """Save the engine and the state of the loop and of the hooks."""
        run, update = self.run, self.run.progress.update
        wait_for(run.device)
        run.settle(run.request(run.window.results))
        state = {**self.identity, WORKING_DIRECTORY: str(Path.cwd()), **asdict(run.progress)}
        for hook in self.hooks:
            state |= hook.state_dict()
        state["health"] = run.health.state_dict()
        loss = self.evaluation.loss_after(update)
        with run.watchdog.transferring(f"saving update {update}"):
            report = save_checkpoint(run.engine, run.config, update, state, loss)
        run.metrics.write("checkpoint", update, **asdict(report))
        run.stopwatch.exclude(report.save_seconds)


def _reached(update: int, every: int) -> bool:
    """Whether something with this period is due; never with a period of 0."""
    return every > 0 and update % every == 0
