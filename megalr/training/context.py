"""What the loop and its hooks share: how far the run is, its health, its log, its surroundings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from megalr.config.schema import RunConfig
from megalr.distributed.stop_vote import StopVote
from megalr.distributed.watchdog import Watchdog
from megalr.models.decoder import Decoder
from megalr.run.metrics_writer import MetricsWriter
from megalr.training.device import CompileClock
from megalr.training.health import Health
from megalr.training.step import StepResult
from megalr.training.step_log import LogWindow, PendingLog, PendingMetrics, Stopwatch


@dataclass
class TrainProgress:
    """How far a run is; saved in every checkpoint.

    Attributes:
        update: updates done, skipped ones included.
        tokens: targets consumed.
        batch_offset: the next batch is number ``update + batch_offset``; every rollback adds the
            number of batches that it skips.
    """

    update: int = 0
    tokens: int = 0
    batch_offset: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> TrainProgress:
        """The progress in the state of a checkpoint."""
        return cls(**{field.name: saved[field.name] for field in fields(cls)})

    @property
    def next_batch(self) -> int:
        """Number of the next update's batch."""
        return self.update + self.batch_offset


@dataclass
class RunContext:
    """A run on this rank, from its first step of this start on.

    Attributes:
        config: the run.
        engine: DeepSpeed's engine around the decoder.
        decoder: the model.
        device: where this rank computes.
        metrics: where events go.
        stop: the ranks' decision to stop.
        watchdog: ends the run if it makes no progress.
        compile_clock: times compilation until the first update has reported it, then None.
        progress: updates and tokens so far.
        health: counts of skipped updates and rollbacks, spike windows.
        stopwatch: times the updates.
        window: the updates since the last log line.
    """

    config: RunConfig
    engine: Any
    decoder: Decoder
    device: torch.device
    metrics: MetricsWriter
    stop: StopVote
    watchdog: Watchdog
    compile_clock: CompileClock | None = None
    progress: TrainProgress = field(default_factory=TrainProgress)
    window: LogWindow = field(default_factory=LogWindow)

    def __post_init__(self) -> None:
        self.health = Health(self.config.health)
        self.stopwatch = Stopwatch(self.device)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return self.config.train.updates

    def request(self, results: list[StepResult]) -> PendingMetrics:
        """Start the copy of losses and norms of these updates to the host; collective."""
        return PendingMetrics(results, self.decoder.plan.mesh.tensor_size)

    def close_window(self) -> PendingLog:
        """The log line of the updates since the last one; the host does not wait for them."""
        window, self.window = self.window, LogWindow()
        metrics = self.request(window.results)
        return PendingLog(window, metrics, self.stopwatch.lap(), self.progress.tokens)

    def settle(self, metrics: PendingMetrics) -> None:
        """Wait for the metrics; report the spikes among them that are only logged."""
        for result in metrics.wait():
            if result.applied and self.config.health.spike_action == "log":
                self.report_spikes(result, loss=result.loss, gradient_norm=result.norm)

    def report_spikes(self, result: StepResult, **values: Any) -> bool:
        """Enter ``loss`` and ``gradient_norm`` of an update into their windows, if they are known.

        Returns:
            Whether one is a spike; there is an event for each.
        """
        spikes = self.health.spikes(**{k: v for k, v in values.items() if v is not None})
        for spike in spikes:
            action = self.config.health.spike_action
            self.metrics.write(
                "spike", result.update, batch=result.batch, action=action, **asdict(spike)
            )
        return bool(spikes)
