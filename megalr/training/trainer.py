"""The training loop.

Order inside an update: step, health check, restart if due, evaluate, save. So a checkpoint is
always after the restart, and resuming from it repeats nothing and skips nothing. A run that is
asked to stop saves after the update it is in; an evaluation that was left out or broken off for it
comes first when the run goes on.

An update whose loss or gradient is not finite changes nothing, on any rank; for the learning rate
and the data it counts as an update all the same. After too many of them the run goes back to its
newest checkpoint and leaves out the batches since (docs/health.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalr.checkpoint.directory import CHECKPOINTS
from megalr.checkpoint.find import find_checkpoint
from megalr.checkpoint.load import load_checkpoint
from megalr.checkpoint.save import save_checkpoint
from megalr.config.schema import RunConfig
from megalr.data.loader import MicroBatch, UpdateBatch, UpdateLoader
from megalr.distributed.agreement import all_reduce_max
from megalr.distributed.stop_vote import StopVote
from megalr.distributed.watchdog import Watchdog
from megalr.engine.state import EngineState
from megalr.errors import AgreedError
from megalr.evaluation.perplexity import evaluate
from megalr.models.flops import flops_per_token
from megalr.restarts.controller import Restarts
from megalr.restarts.momentum_reset import reset_moments
from megalr.restarts.relora import Relora
from megalr.run.metrics_writer import MetricsWriter, Stopwatch
from megalr.training.device import CompileClock, peak_flops, peak_memory_gib, wait_for
from megalr.training.due import Due
from megalr.training.health import Health
from megalr.training.progress import TrainProgress
from megalr.training.step import train_step
from megalr.training.step_log import LogWindow, PendingLog, PendingMetrics, StepResult


class Trainer:
    """Runs the updates of a run on an engine.

    Args:
        config: the run.
        engine: DeepSpeed's engine around a Decoder.
        device: where this rank computes.
        batches: this rank's batches, from that of the next update on.
        validation: the fixed validation batches, iterable again and again, on the way (False) and
            after the last update (True); None without evaluation.
        restarts: refactorization and momentum reset; also gives the learning rate's factor.
        relora: ReLoRA's merges; None for other methods.
        metrics: where events go.
        stop: the ranks' decision to stop.
        watchdog: told of all progress.
        clock: asked for the time of compilation.
        state: further plain values to save in every checkpoint.
        saved: what the checkpoint says that the engine has loaded; None without one.

    Attributes:
        update: updates done.
        health: counts of skipped updates and rollbacks.
        train_seconds: time of the updates so far, without evaluation, saving and restarts.
        validation_loss: update of the last evaluation made here, and its loss.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        device: torch.device,
        batches: UpdateLoader,
        validation: Mapping[bool, Iterable[MicroBatch]] | None,
        restarts: Restarts,
        relora: Relora | None,
        metrics: MetricsWriter,
        stop: StopVote,
        watchdog: Watchdog,
        clock: CompileClock,
        state: dict[str, Any],
        saved: dict[str, Any] | None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.device = device
        self.batches = batches
        self.validation = validation
        self.restarts = restarts
        self.relora = relora
        self.metrics = metrics
        self.stop = stop
        self.watchdog = watchdog
        self.clock = clock
        self.state = state
        self.health = Health(config.health)
        self.folder = Path(config.run.dir)
        self.watch = Stopwatch()
        self.train_seconds = 0.0
        self.validation_loss: tuple[int, float | None] = (0, None)
        self._interval = LogWindow()
        self._due = Due(config, validation is not None, restarts, relora)
        self._copies = dist.get_world_size() // engine.dp_world_size  # ranks with the same batch
        self._reject = self._loss_spikes if self.health.decides_before_step else None
        self._flops_per_token = flops_per_token(engine.module, config.data.sequence_length)
        self._peak_flops = peak_flops(device, config.train.precision)
        self._go_on_from(TrainProgress())
        if saved is not None:
            self._restore(saved)
            self.health.load_state_dict(saved["health"])

    @property
    def position(self) -> TrainProgress:
        """How far the run is."""
        return TrainProgress(self.update, self.tokens, self.batch_offset, self.evaluation_pending)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.update >= self.config.train.updates and not self.evaluation_pending

    def run(self) -> None:
        """Train to the end, or until the ranks agree to stop; see :attr:`finished`.

        Evaluates and saves as configured, and after the last update. A stop before the first
        update saves nothing, because nothing is new.

        Raises:
            AgreedError: bad updates that rolling back does not get past.
        """
        self.watch.lap()
        if not self.stop.requested(now=True) and self.evaluation_pending:
            self.evaluate()
            if self.finished:
                self.save()  # again, now with nothing pending
        compiling = self.config.train.compile
        late: tuple[StepResult, PendingLog | None] | None = (
            None  # the update before, not heard of yet
        )
        while self.update < self.config.train.updates and self.stop.reason is None:
            made = self.train_update(self._next_batch())
            if compiling:  # the first update of this start, or the CUDA graph before, compiled
                self.metrics.write("compile", made.update, **self.clock.metrics())
                compiling = False
            if late is not None:
                self.check_deferred(*late)
                late = None
            self.stop.requested()
            if self._can_wait(made):
                late = made, self.begin_report() if self._due.log(self.update) else None
                continue
            trouble = self.check(made)
            if trouble is not None:
                self.roll_back(trouble)
                continue
            self.restart_if_due(made)
            self.finish_update()
        if self.stop.reason is not None:
            if self._interval.made:
                self.write_report(self.begin_report())
            self.metrics.write("signal", self.update, signal=self.stop.reason)
            self.stop.acknowledge()

    def _next_batch(self) -> UpdateBatch:
        started = time.perf_counter()
        batch = next(self.batches)
        self._interval.waited += time.perf_counter() - started
        return batch

    def train_update(self, batch: UpdateBatch) -> StepResult:
        """One optimizer step on the global batch, or none if that is bad; counted either way."""
        factor = self.restarts.learning_rate_factor(self.update)
        rate = self.config.optimizer.lr * factor
        made = train_step(self.engine, batch, self.update + 1, rate, self._reject)
        self._interval.made.append(made)
        self.tokens += batch.num_targets
        self.update += 1
        self.watchdog.progress(f"after update {self.update}")
        return made

    def _loss_spikes(self, made: StepResult) -> bool:
        """Whether the loss of an update whose step is still to be made is a spike."""
        PendingMetrics([made], self._copies).wait()
        return self._report_spikes(made, loss=made.loss)

    def _can_wait(self, made: StepResult) -> bool:
        """Whether an update may be checked, and reported, after the next one is launched.

        So the device has work while the host waits to hear of the update.
        """
        something = self.stop.reason is not None or self._due.between(self.update)
        return not made.known and not something and self.health.may_count_late

    def check_deferred(self, made: StepResult, report: PendingLog | None) -> None:
        """Check an update after the next one has been launched, and write the report due then."""
        self.check(made)
        if report is not None:
            self.write_report(report)

    def check(self, made: StepResult) -> str | None:
        """Count an update, report it if it is bad; the reason if the run must go back for it."""
        if not made.applied:
            self.metrics.write(
                "skip",
                made.update,
                reason="spike" if made.spike else "non_finite",
                batch=made.batch,
                skipped_in_row=self.health.skipped_in_row + 1,
                skipped=self.health.skipped + 1,
            )
        if self.health.count(made.applied):
            return f"{self.health.skipped_in_row} updates in a row were skipped"
        if not made.applied or not self.health.decides_after_step:
            return None
        PendingMetrics([made], self._copies).wait()
        norm = all_reduce_max(float(made.norm), self.device)
        if not self._report_spikes(made, loss=made.loss, gradient_norm=norm):
            return None
        if self.config.health.spike_action == "rollback":
            return "the loss or the gradient norm spiked"
        self._reset_moments(made.update)
        return None

    def _report_spikes(self, made: StepResult, **values: Any) -> bool:
        """Whether the values of an update are spikes; an event for each."""
        found = self.health.spikes(**{k: v for k, v in values.items() if v is not None})
        for spike in found:
            action = self.config.health.spike_action
            self.metrics.write(
                "spike", made.update, batch=made.batch, action=action, **spike.metrics()
            )
        return bool(found)

    def _reset_moments(self, update: int) -> None:
        """Start all moments of the optimizer anew."""
        started = time.perf_counter()
        state = EngineState(self.engine)
        done = reset_moments(state, state.parameters())
        seconds = time.perf_counter() - started
        self.metrics.write(
            "reset", update, reason="spike", fraction_reset=done.fraction, reset_seconds=seconds
        )
        self.watch.exclude(seconds)

    def roll_back(self, reason: str) -> None:
        """Go back to the newest checkpoint and leave out every batch since, the bad ones included.

        Raises:
            AgreedError: too many rollbacks, or no checkpoint.
        """
        self.health.count_rollback(self.update, reason)
        found = find_checkpoint(self.folder, self.config.checkpoint.verify)
        if found.tag is None:
            raise AgreedError(
                f"{reason} at update {self.update}, before the first checkpoint: lower "
                "optimizer.lr, lengthen the warm-up, or save earlier (checkpoint.every)"
            )
        started = time.perf_counter()
        at = self.position
        with self.watchdog.transferring(f"rolling back after update {at.update}"):
            saved = load_checkpoint(self.engine, self.folder, found.tag).state
        self._restore(saved)
        self.health.go_back(saved["health"])
        left_out = at.next_batch - self.position.next_batch
        self.batch_offset += left_out
        self.batches.seek(at.next_batch)
        self._interval = LogWindow()
        self.validation_loss = (0, None)
        self.metrics.write(
            "rollback",
            at.update,
            reason=reason,
            to_update=self.update,
            path=f"{CHECKPOINTS}/{found.tag}",
            damaged=found.damaged,
            first_batch_left_out=at.next_batch - left_out,
            batches_left_out=left_out,
            rollbacks=self.health.rollbacks,
            rollback_seconds=time.perf_counter() - started,
        )
        self.watch.lap()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint that the engine has just loaded."""
        self._go_on_from(TrainProgress.of(saved))
        self.restarts.load_state_dict(saved["restarts"])
        self.restarts.after_load()
        if self.relora is not None:
            self.relora.state.relink()

    def _go_on_from(self, position: TrainProgress) -> None:
        self.update = position.update
        self.tokens = position.tokens
        self.batch_offset = position.batch_offset
        self.evaluation_pending = position.evaluation_pending

    def restart_if_due(self, made: StepResult) -> None:
        """Refactorize, reset or merge if that is due after this update; report it."""
        merge = self.relora.after_update(self.update) if self.relora is not None else None
        if merge is not None:
            self.metrics.write("merge", self.update, **merge.metrics())
            self.watch.exclude(merge.merge_seconds)
        before = self.restarts.seconds
        report = self.restarts.after_update(self.update, made.norm)
        if report is not None:
            self.metrics.write("restart", self.update, **report.metrics())
            self.watch.exclude(self.restarts.seconds - before)

    def finish_update(self) -> None:
        """Report, evaluate and save, each if it is due."""
        last = self.update == self.config.train.updates
        if self._due.log(self.update):
            self.write_report(self.begin_report())
        if self._due.evaluation(self.update):
            self.evaluation_pending = True
            self.evaluate()
        # Not among skipped updates: the newest checkpoint is where a rollback goes.
        due = self._due.checkpoint(self.update) and not self.health.skipped_in_row
        if last or due or self.stop.reason is not None:
            self.save()
            self.stop.requested(now=True)

    def _settle(self, asked: PendingMetrics) -> None:
        """Know the losses of the updates; spikes that are only told of are told now."""
        for made in asked.wait():
            if made.applied and self.config.health.spike_action == "log":
                self._report_spikes(made, loss=made.loss, gradient_norm=made.norm)

    def begin_report(self) -> PendingLog:
        """A report about the updates since the last one; the host does not wait for them yet."""
        interval, self._interval = self._interval, LogWindow()
        return PendingLog(
            interval, PendingMetrics(interval.made, self._copies), self.update, self.tokens
        )

    def write_report(self, report: PendingLog) -> None:
        """Wait for the updates of a report and write it down."""
        self._settle(report.asked)
        seconds = self.watch.lap()
        self.train_seconds += seconds
        numbers = report.interval.numbers(seconds)
        flops = numbers["tokens_per_second"] * self._flops_per_token / dist.get_world_size()
        self.metrics.write(
            "step",
            report.update,
            **numbers,
            tokens=report.tokens,
            mfu=flops / self._peak_flops if self._peak_flops else "n/a",
            peak_memory_gib=peak_memory_gib(self.device, self.config.train.cuda_graphs),
            eta_seconds=numbers["step_seconds"] * (self.config.train.updates - report.update),
        )

    def evaluate(self) -> None:
        """Evaluate on the validation set and report it, unless the run is to stop."""
        if self.validation is None or self.stop.requested(now=True):
            return
        wait_for(self.device)
        result = evaluate(
            self.engine.module,
            self._until_stopped(self.validation[self.update >= self.config.train.updates]),
            self.device,
            self.engine.seq_data_parallel_group,
        )
        self.watch.exclude(result.eval_seconds)
        if not self.stop.requested(now=True):
            self.metrics.write("eval", self.update, **asdict(result))
            self.validation_loss = (self.update, result.loss)
            self.evaluation_pending = False

    def _until_stopped(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches, ending early, on all ranks at the same one, when the run is to stop."""
        for batch in batches:
            yield batch
            self.watchdog.progress(f"evaluating after update {self.update}")
            if self.stop.requested():
                return

    def save(self) -> None:
        """Save a checkpoint and report it."""
        wait_for(self.device)
        self._settle(PendingMetrics(self._interval.made, self._copies))
        state = {
            **self.state,
            **asdict(self.position),
            "restarts": self.restarts.state_dict(),
            "health": self.health.state_dict(),
        }
        evaluated, loss = self.validation_loss
        known = loss if evaluated == self.update else None
        with self.watchdog.transferring(f"saving update {self.update}"):
            report = save_checkpoint(self.engine, self.config, self.update, state, known)
        self.metrics.write("checkpoint", self.update, **asdict(report))
        self.watch.exclude(report.save_seconds)
