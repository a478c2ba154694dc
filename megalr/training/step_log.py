"""Metrics accumulated since the last log line, and their asynchronous copy to the host.

Losses and norms stay on the device. Their copy to the host starts when an update has been launched
and is read after the next one has been: the host then waits for the one update only, and the device
always has work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megalr.engine.skip_step import HostCopy
from megalr.training.step import StepResult


class PendingMetrics:
    """Losses and norms of some updates on their way to the host, in one sum over all ranks.

    Every rank must create it for the same updates.

    Args:
        results: the updates; those whose loss is known stay as they are.
        copies: ranks that compute the same losses, the size of the tensor-parallel group.
    """

    def __init__(self, results: list[StepResult], copies: int) -> None:
        self._open = [result for result in results if result.loss is None]
        self._copies = copies
        if not self._open:
            return
        sums = torch.stack([result.loss_sum for result in self._open])
        if dist.is_initialized():
            dist.all_reduce(sums)
        norms = [_scalar(result.norm, sums) for result in self._open]
        self._copy = HostCopy(torch.stack([sums, torch.stack(norms)]))  # (2, updates) float64

    def wait(self) -> list[StepResult]:
        """Set loss and norm of the updates; the host waits until the device has them.

        Returns:
            The updates whose loss was not known before.
        """
        if not self._open:
            return []
        sums, norms = self._copy.read().tolist()
        for result, total, norm in zip(self._open, sums, norms, strict=True):
            result.loss = total / self._copies / max(1, result.targets)
            result.norm = norm
        return self._open


def _scalar(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A number as a tensor (), with dtype and device of ``like``; the host does not wait."""
    if isinstance(value, torch.Tensor):
        return value.to(like).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


@dataclass
class LogWindow:
    """The updates since the last log line.

    Attributes:
        results: one per update, skipped ones too.
        waited: seconds in which this rank waited for the loader to have a batch ready.
    """

    results: list[StepResult] = field(default_factory=list)
    waited: float = 0.0

    @property
    def targets(self) -> int:
        """Targets of all updates, skipped ones too."""
        return sum(result.targets for result in self.results)

    def mean_loss(self) -> float:
        """Loss per target over the updates that were applied; NaN if none was.

        Losses must be known (:meth:`PendingMetrics.wait`), here and in :meth:`numbers`.
        """
        applied = [result for result in self.results if result.applied]
        total = sum(r.loss * r.targets for r in applied if r.loss is not None)
        return total / max(1, sum(r.targets for r in applied)) if applied else float("nan")

    def numbers(self, seconds: float) -> dict[str, Any]:
        """Fields of a ``step`` event about these updates, which took ``seconds``."""
        return {
            "loss": self.mean_loss(),
            "gradient_norm": float(self.results[-1].norm),
            "learning_rate": self.results[-1].learning_rate,
            "tokens_per_second": self.targets / seconds,
            "step_seconds": seconds / len(self.results),
            "data_seconds": self.waited / len(self.results),
            "samples_by_source": self.samples_by_source(),
        }

    def samples_by_source(self) -> list[int]:
        """Samples of all updates, by source."""
        return [sum(counts) for counts in zip(*(r.samples for r in self.results), strict=True)]


class Stopwatch:
    """Times the updates without what is measured separately (evaluation, saving, restarts).

    A lap ends with the work launched so far, even if its time is read after more has been launched:
    by a CUDA event on a GPU, which the host may run ahead of, by the host's clock elsewhere.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._clock = device, clock
        self._start, self._excluded = self._now(), 0.0

    def exclude(self, seconds: float) -> None:
        """Take these seconds, just spent, out of the running lap."""
        self._excluded += seconds

    def lap(self) -> Callable[[], float]:
        """End the running lap and start the next.

        Returns:
            A function that waits for the end of the lap and returns its seconds.
        """
        start, end, excluded = self._start, self._now(), self._excluded
        self._start, self._excluded = end, 0.0
        return lambda: _seconds_between(start, end) - excluded

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: Any, end: Any) -> float:
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class PendingLog(NamedTuple):
    """A log line whose numbers are on their way to the host.

    ``seconds`` waits for the time of the updates; ``tokens`` is the number of targets consumed.
    """

    window: LogWindow
    metrics: PendingMetrics
    seconds: Callable[[], float]
    tokens: int
