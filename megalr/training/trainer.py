"""The training loop.

A bad update changes nothing, on any rank (megalr/engine/skip_step.py); for the learning rate and
the data it counts as an update. After too many of them the run goes back to its newest checkpoint
and skips the batches since (docs/health.md).

An update can be finished (checked, logged) after the next one has been launched, so that the device
has work while the host waits for its numbers. That is done only where it changes no decision:
events, counts and rollbacks are those of finishing each update at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megalr.checkpoint.find import find_checkpoint
from megalr.checkpoint.load import load_checkpoint
from megalr.data.loader import UpdateBatch, UpdateLoader
from megalr.distributed.agreement import all_reduce_max, raise_on_any_rank
from megalr.engine.state import EngineState
from megalr.errors import AgreedError
from megalr.restarts.momentum_reset import reset_moments
from megalr.run.folder import CHECKPOINTS
from megalr.training.context import RunContext, TrainProgress
from megalr.training.hooks import Hook
from megalr.training.step import StepResult, train_step
from megalr.training.step_log import LogWindow


class Trainer:
    """Makes the updates of a run.

    Args:
        run: the run on this rank.
        loader: this rank's batches, from that of the next update on.
        learning_rate_factor: factor of the peak learning rate when t updates are done.
        hooks: what is done after some updates, in this order.
    """

    def __init__(
        self,
        run: RunContext,
        loader: UpdateLoader,
        learning_rate_factor: Callable[[int], float],
        hooks: Sequence[Hook],
    ) -> None:
        self.run = run
        self.loader = loader
        self.learning_rate_factor = learning_rate_factor
        self.hooks = hooks
        self._deferred: StepResult | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        done = self.run.progress.update >= self.run.total_updates
        return done and not any(hook.pending for hook in self.hooks)

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue from the state of the checkpoint that the engine has loaded."""
        self._restore(saved)
        self.run.health.load_state_dict(saved["health"])

    def train(self) -> None:
        """Train to the end, or until the ranks agree to stop; see :attr:`finished`.

        A stop before the first update saves nothing, because nothing is new.

        Raises:
            AgreedError: bad updates that rolling back does not get past.
        """
        run = self.run
        run.stopwatch.lap()
        if not run.stop.requested(now=True):
            for hook in self.hooks:
                hook.at_start()
        while run.progress.update < run.total_updates and run.stop.reason is None:
            result = self.train_update(self._next_batch())
            self._finish_deferred()
            run.window.results.append(result)
            run.stop.requested()
            if self._can_defer(result):
                self._defer(result)
            else:
                self.finish(result)
        if run.stop.reason is not None:
            for hook in self.hooks:
                hook.at_stop()
            run.metrics.write("signal", run.progress.update, signal=run.stop.reason)
            run.stop.acknowledge()

    def _next_batch(self) -> UpdateBatch:
        started = time.perf_counter()
        batch = next(self.loader)
        self.run.window.waited += time.perf_counter() - started
        return batch

    def train_update(self, batch: UpdateBatch) -> StepResult:
        """One optimizer step on the global batch, or none if that is bad; counted either way."""
        run, progress = self.run, self.run.progress
        rate = run.config.optimizer.lr * self.learning_rate_factor(progress.update)
        reject = self._loss_spikes if run.health.decides_before_step else None
        result = train_step(run.engine, batch, progress.update + 1, rate, reject)
        progress.tokens += batch.num_targets
        progress.update += 1
        run.watchdog.progress(f"after update {progress.update}")
        if run.compile_clock is not None:  # the first update, or the CUDA graph before, compiled
            run.metrics.write("compile", result.update, **run.compile_clock.metrics())
            run.compile_clock = None
        return result

    def _loss_spikes(self, result: StepResult) -> bool:
        """Whether the loss of an update that has not been made yet is a spike."""
        self.run.request([result]).wait()
        return self.run.report_spikes(result, loss=result.loss)

    def _can_defer(self, result: StepResult) -> bool:
        """Whether finishing an update after the next is launched changes no decision."""
        due = [hook for hook in self.hooks if hook.due(result.update)]
        return (
            not result.known
            and self.run.stop.reason is None
            and self.run.health.may_check_late
            and all(hook.deferrable for hook in due)
        )

    def _defer(self, result: StepResult) -> None:
        """Finish an update after the next is launched; start to fetch the numbers for it now."""
        for hook in self.hooks:
            if hook.due(result.update):
                hook.prefetch()
        self._deferred = result

    def _finish_deferred(self) -> None:
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            self.finish(deferred)

    def finish(self, result: StepResult) -> None:
        """Check an update, then do what is due after it, or go back if it must be undone."""
        trouble = self.check(result)
        if trouble is not None:
            self.roll_back(trouble)
            return
        for hook in self.hooks:
            if hook.due(result.update):
                hook.after_step(result)

    def check(self, result: StepResult) -> str | None:
        """Count an update, report it if it is bad; the reason if the run must go back for it.

        Raises:
            AgreedError: some rank could not read its batch.
        """
        run, health = self.run, self.run.health
        if not result.applied:
            raise_on_any_rank(self.loader.error)
            run.metrics.write(
                "skip",
                result.update,
                reason="spike" if result.spike else "non_finite",
                batch=result.batch,
                skipped_in_row=health.skipped_in_row + 1,
                skipped=health.skipped + 1,
            )
        if health.count(result.applied):
            return f"{health.skipped_in_row} updates in a row were skipped"
        if not result.applied or not health.decides_after_step:
            return None
        run.request([result]).wait()
        norm = all_reduce_max(float(result.norm), run.device)
        if not run.report_spikes(result, loss=result.loss, gradient_norm=norm):
            return None
        if run.config.health.spike_action == "rollback":
            return "the loss or the gradient norm spiked"
        self._reset_moments(result.update)
        return None

    def _reset_moments(self, update: int) -> None:
        """Zero all moments of the optimizer after a spike."""
        started = time.perf_counter()
        state = EngineState(self.run.engine)
        report = reset_moments(state, state.parameters())
        seconds = time.perf_counter() - started
        self.run.metrics.write(
            "reset", update, reason="spike", fraction_reset=report.fraction, reset_seconds=seconds
        )
        self.run.stopwatch.exclude(seconds)

    def roll_back(self, reason: str) -> None:
        """Go back to the newest checkpoint and skip every batch since, the bad ones included.

        Raises:
            AgreedError: too many rollbacks, or no checkpoint.
        """
        run, at = self.run, self.run.progress
        run.health.count_rollback(at.update, reason)
        found = find_checkpoint(run.folder, run.config.checkpoint.verify)
        if found.tag is None:
            raise AgreedError(
                f"{reason} at update {at.update}, before the first checkpoint: lower "
                "optimizer.lr, lengthen the warm-up, or save earlier (checkpoint.every)"
            )
        started = time.perf_counter()
        with run.watchdog.transferring(f"rolling back after update {at.update}"):
            saved = load_checkpoint(run.engine, run.folder, found.tag).state
        self._restore(saved)
        run.health.go_back(saved["health"])
        batches_skipped = at.next_batch - run.progress.next_batch
        run.progress.batch_offset += batches_skipped
        self.loader.seek(at.next_batch)
        run.window = LogWindow()
        run.metrics.write(
            "rollback",
            at.update,
            reason=reason,
            to_update=run.progress.update,
            path=f"{CHECKPOINTS}/{found.tag}",
            damaged=found.damaged,
            first_batch_left_out=at.next_batch - batches_skipped,
            batches_left_out=batches_skipped,
            rollbacks=run.health.rollbacks,
            rollback_seconds=time.perf_counter() - started,
        )
        run.stopwatch.lap()

    def _restore(self, saved: dict[str, Any]) -> None:
        self.run.progress = TrainProgress.of(saved)
        for hook in self.hooks:
            hook.load_state_dict(saved)
