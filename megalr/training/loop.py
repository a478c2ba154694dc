"""The training loop.

Order inside an update: step, restart if due, evaluate, save. So a checkpoint is always after the
restart, and resuming from it repeats nothing and skips nothing. A run that is asked to stop saves
after the update it is in; an evaluation that was left out or broken off for it comes first when the
run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.data.loader import MicroBatch, UpdateBatch
from megalr.models.flops import flops_per_token
from megalr.restarts.controller import Restarts
from megalr.restarts.relora import Relora
from megalr.training.checkpoint import save_checkpoint
from megalr.training.engine import gradient_norm, plain_gradient_norm, set_learning_rate
from megalr.training.evaluation import evaluate
from megalr.training.hardware import peak_flops, peak_memory_gib
from megalr.training.metrics import MetricsWriter, Stopwatch
from megalr.training.stopping import StopCheck


@dataclass(frozen=True)
class Position:
    """How far a run is; saved in every checkpoint.

    Attributes:
        update: updates done.
        tokens: targets consumed.
        evaluation_pending: the evaluation after the last update is still to be made.
    """

    update: int = 0
    tokens: int = 0
    evaluation_pending: bool = False


class Trainer:
    """Runs the updates from ``start`` to ``train.updates`` on an engine.

    Args:
        config: the run.
        engine: DeepSpeed's engine around a Decoder.
        device: where this rank computes.
        batches: this rank's UpdateBatch of every update from ``start`` on.
        validation: the fixed validation batches, iterable again and again; None without evaluation.
        restarts: refactorization and momentum reset; also gives the learning rate's factor.
        relora: ReLoRA's merges; None for other methods.
        metrics: where events go.
        stop: the ranks' decision to stop.
        state: further plain values to save in every checkpoint.
        start: how far the run is.

    Attributes:
        update: updates done.
        train_seconds: time of the updates so far, without evaluation, saving and restarts.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        device: torch.device,
        batches: Iterator[UpdateBatch],
        validation: Iterable[MicroBatch] | None,
        restarts: Restarts,
        relora: Relora | None,
        metrics: MetricsWriter,
        stop: StopCheck,
        state: dict[str, Any],
        start: Position,
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
        self.state = state
        self.update = start.update
        self.tokens = start.tokens
        self.evaluation_pending = start.evaluation_pending
        self.folder = Path(config.run.dir)
        self.watch = Stopwatch()
        self.train_seconds = 0.0
        self._interval = _Interval(device)
        self._flops_per_token = flops_per_token(engine.module, config.data.sequence_length)
        self._peak_flops = peak_flops(device, config.train.precision)

    @property
    def position(self) -> Position:
        """How far the run is."""
        return Position(self.update, self.tokens, self.evaluation_pending)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.update >= self.config.train.updates and not self.evaluation_pending

    def run(self) -> None:
        """Train to the end, or until the ranks agree to stop; see :attr:`finished`.

        Evaluates and saves as configured, and after the last update. A stop before the first
        update saves nothing, because nothing is new.
        """
        self.watch.lap()
        if not self.stop.agreed(now=True) and self.evaluation_pending:
            self.evaluate()
        while self.update < self.config.train.updates and self.stop.reason is None:
            self.train_update(next(self.batches))
            self.restart_if_due()
            self.finish_update()
        if self.stop.reason is not None:
            if self._interval.updates:
                self.log_step()
            self.metrics.write("signal", self.update, signal=self.stop.reason)
            self.stop.honoured()

    def finish_update(self) -> None:
        """Report, evaluate and save, each if it is due; look whether to stop."""
        config = self.config
        last = self.update == config.train.updates
        self.stop.agreed()
        if last or self.update % config.log.every == 0:
            self.log_step()
        if self.validation is not None and (last or _due(self.update, config.evaluation.every)):
            self.evaluation_pending = True
            self.evaluate()
        if last or self.stop.reason is not None or _due(self.update, config.checkpoint.every):
            self.save()
            self.stop.agreed(now=True)

    def train_update(self, batch: UpdateBatch) -> None:
        """One optimizer step on the global batch.

        The gradient is that of the mean loss per target over the global batch, whatever the
        number of ranks and micro-batches: each micro-batch contributes its summed loss divided by
        the global number of targets, times the number of ranks because the engine averages over
        them.
        """
        engine = self.engine
        self._interval.learning_rate = (
            self.config.optimizer.lr * self.restarts.learning_rate_factor(self.update)
        )
        set_learning_rate(engine, self._interval.learning_rate)
        scale = engine.dp_world_size / max(1, batch.num_targets)
        for input_ids, labels in batch.micro_batches:
            loss = engine(
                input_ids.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                scale,
            )
            # A tensor of its own: on the very output of the engine, DeepSpeed's hook divides by the
            # number of micro-batches although it is told not to (docs/deepspeed-notes.md).
            engine.backward(loss.clone(), scale_wrt_gas=False)
            self._interval.loss_sum += loss.detach() / scale
            if engine.get_global_grad_norm() is None and engine.is_gradient_accumulation_boundary():
                self._interval.norm = plain_gradient_norm(engine.module)
            engine.step()
        if engine.get_global_grad_norm() is not None:
            self._interval.norm = gradient_norm(engine)
        self._interval.targets += batch.num_targets
        self._interval.samples.append(batch.samples_by_source)
        self._interval.updates += 1
        self.tokens += batch.num_targets
        self.update += 1

    def restart_if_due(self) -> None:
        """Refactorize, reset or merge if that is due after this update; report it."""
        merge = self.relora.after_update(self.update) if self.relora is not None else None
        if merge is not None:
            self.metrics.write("merge", self.update, **merge.metrics())
            self.watch.exclude(merge.merge_seconds)
        before = self.restarts.seconds
        report = self.restarts.after_update(self.update, self._interval.norm)
        if report is not None:
            self.metrics.write("restart", self.update, **report.metrics())
            self.watch.exclude(self.restarts.seconds - before)

    def log_step(self) -> None:
        """Report the updates since the last report; the only place that waits for the device."""
        loss_sum = self._interval.loss_sum
        if dist.is_initialized():
            dist.all_reduce(loss_sum, group=self.engine.seq_data_parallel_group)
        loss = float(loss_sum) / max(1, self._interval.targets)
        seconds = self.watch.lap()
        self.train_seconds += seconds
        rate = self._interval.targets / seconds
        world = dist.get_world_size() if dist.is_initialized() else 1
        mfu: float | str = "n/a"
        if self._peak_flops is not None:
            mfu = rate * self._flops_per_token / (self._peak_flops * world)
        step_seconds = seconds / self._interval.updates
        self.metrics.write(
            "step",
            self.update,
            loss=loss,
            gradient_norm=float(self._interval.norm),
            learning_rate=self._interval.learning_rate,
            tokens=self.tokens,
            tokens_per_second=rate,
            step_seconds=step_seconds,
            mfu=mfu,
            peak_memory_gib=peak_memory_gib(self.device),
            samples_by_source=[sum(counts) for counts in zip(*self._interval.samples, strict=True)],
            eta_seconds=step_seconds * (self.config.train.updates - self.update),
        )
        self._interval = _Interval(self.device)

    def evaluate(self) -> None:
        """Evaluate on the validation set and report it, unless the run is to stop."""
        if self.validation is None or self.stop.agreed(now=True):
            return
        self._wait()
        result = evaluate(
            self.engine.module,
            self._until_stopped(self.validation),
            self.device,
            self.engine.seq_data_parallel_group,
        )
        self.watch.exclude(result.eval_seconds)
        if not self.stop.agreed(now=True):
            self.metrics.write("eval", self.update, **asdict(result))
            self.evaluation_pending = False

    def _until_stopped(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches, ending early, on all ranks at the same one, when the run is to stop."""
        for batch in batches:
            yield batch
            if self.stop.agreed():
                return

    def save(self) -> None:
        """Save a checkpoint and report it."""
        self._wait()
        path, seconds = save_checkpoint(
            self.engine,
            self.folder,
            self.update,
            {**self.state, **asdict(self.position), "restarts": self.restarts.state_dict()},
            self.config.checkpoint.keep_last,
        )
        self.metrics.write("checkpoint", self.update, path=path, save_seconds=seconds)
        self.watch.exclude(seconds)

    def _wait(self) -> None:
        """Let the device finish, so that its time is not counted as what comes next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Interval:
    """Sums since the last report; the loss stays on the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.norm: torch.Tensor | float = float("nan")
        self.learning_rate = 0.0
        self.targets = 0
        self.samples: list[tuple[int, ...]] = []  # of each source of the data, by update
        self.updates = 0


def _due(update: int, every: int) -> bool:
    """Whether something with this period is due; a period of 0 never is."""
    return every > 0 and update % every == 0
