"""What is remembered of the updates since the last report, and how the host hears of it.

Losses and norms stay on the device. What the host wants to know starts on its way when the update
has been launched, and is read after the next one has: reading it then waits for the one update only
and the device is never without work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megalr.engine.skip_step import DeferredSkip, HostCopy


@dataclass
class StepResult:
    """One update, made or skipped.

    Attributes:
        update: updates done, this one included.
        batch: number of its batch.
        targets: of the global batch.
        samples: samples of the global batch by source of the data.
        learning_rate: what it was made with.
        loss_sum: this rank's sum over its targets, on the device.
        norm: global norm of the gradient; infinite or not a number where it was not finite. A
            tensor on the device until the loss is known.
        skipped: whether nothing was changed; coming while the host does not know.
        spike: it was skipped because its loss is a spike.
        loss: mean per target over all ranks; None until :meth:`Asked.wait`.
    """

    update: int
    batch: int
    targets: int
    samples: tuple[int, ...]
    learning_rate: float
    loss_sum: torch.Tensor
    norm: torch.Tensor | float = float("nan")
    skipped: DeferredSkip | bool = False
    spike: bool = False
    loss: float | None = None

    @property
    def known(self) -> bool:
        """Whether the host knows if the update was left out."""
        return not isinstance(self.skipped, DeferredSkip)

    @property
    def applied(self) -> bool:
        """Whether weights and moments were changed; the host waits for the answer if need be."""
        if isinstance(self.skipped, DeferredSkip):
            self.skipped = self.skipped.read()
        return not self.skipped


@dataclass
class LogWindow:
    """The updates since the last report.

    Attributes:
        made: one entry an update, skipped ones too.
        waited: seconds in which this rank waited for the loader to have a batch ready.
    """

    made: list[StepResult] = field(default_factory=list)
    waited: float = 0.0

    @property
    def targets(self) -> int:
        """Targets of all updates, skipped ones too."""
        return sum(made.targets for made in self.made)

    def mean_loss(self) -> float:
        """Loss per target over the updates that were applied; NaN if none was. Settled ones."""
        applied = [made for made in self.made if made.applied]
        total = sum(made.loss * made.targets for made in applied if made.loss is not None)
        return total / max(1, sum(made.targets for made in applied)) if applied else float("nan")

    def numbers(self, seconds: float) -> dict[str, Any]:
        """Fields of a ``step`` event about these updates, which took so long. Settled ones."""
        return {
            "loss": self.mean_loss(),
            "gradient_norm": float(self.made[-1].norm),
            "learning_rate": self.made[-1].learning_rate,
            "tokens_per_second": self.targets / seconds,
            "step_seconds": seconds / len(self.made),
            "data_seconds": self.waited / len(self.made),
            "samples_by_source": self.samples_by_source(),
        }

    def samples_by_source(self) -> list[int]:
        """Samples of all updates, by source."""
        return [sum(counts) for counts in zip(*(m.samples for m in self.made), strict=True)]


class PendingMetrics:
    """Losses and norms of some updates that the host has asked for: one sum over all ranks.

    Every rank must ask for the same updates.

    Args:
        made: the updates; those whose loss is known are left alone.
        copies: ranks that compute the same losses, the size of the tensor-parallel group.
    """

    def __init__(self, made: list[StepResult], copies: int) -> None:
        self._open = [one for one in made if one.loss is None]
        self._copies = copies
        if not self._open:
            return
        sums = torch.stack([one.loss_sum for one in self._open])
        if dist.is_initialized():
            dist.all_reduce(sums)
        norms = [_number(one.norm, sums) for one in self._open]
        self._coming = HostCopy(torch.stack([sums, torch.stack(norms)]))  # (2, updates) float64

    def wait(self) -> list[StepResult]:
        """Write down loss and norm of the updates; the host waits until the device has them.

        Returns:
            The updates whose loss was not known before.
        """
        if not self._open:
            return []
        sums, norms = self._coming.read().tolist()
        for made, total, norm in zip(self._open, sums, norms, strict=True):
            made.loss = total / self._copies / max(1, made.targets)
            made.norm = norm
        return self._open


def _number(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A number as a tensor (), with dtype and device of ``like``; nobody waits."""
    if isinstance(value, torch.Tensor):
        return value.to(like).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class PendingLog:
    """A report that is due: the updates it is about, and where the run was.

    Attributes:
        interval: the updates.
        asked: their losses and norms.
        update: updates done.
        tokens: targets done.
    """

    interval: LogWindow
    asked: PendingMetrics
    update: int
    tokens: int
