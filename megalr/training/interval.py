"""What is remembered of the updates since the last report; losses stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Made:
    """One update, made or skipped.

    Attributes:
        update: updates done, this one included.
        batch: number of its batch.
        targets: of the global batch.
        samples: samples of the global batch by source of the data.
        learning_rate: what it was made with.
        loss_sum: this rank's sum over its targets, on the device.
        norm: global norm of the gradient; infinite or not a number where it was not finite.
        left_out: whether nothing was changed; a tensor on the device while the host does not know.
        spike: it was skipped because its loss is a spike.
        loss: mean per target over all ranks; None until :func:`settle`.
    """

    update: int
    batch: int
    targets: int
    samples: tuple[int, ...]
    learning_rate: float
    loss_sum: torch.Tensor
    norm: torch.Tensor | float = float("nan")
    left_out: torch.Tensor | bool = False
    spike: bool = False
    loss: float | None = None

    @property
    def known(self) -> bool:
        """Whether the host knows if the update was left out."""
        return not isinstance(self.left_out, torch.Tensor)

    @property
    def applied(self) -> bool:
        """Whether weights and moments were changed; the host waits for the answer if need be."""
        self.left_out = bool(self.left_out)
        return not self.left_out


@dataclass
class Interval:
    """The updates since the last report.

    Attributes:
        made: one entry an update, skipped ones too.
        waited: seconds in which this rank waited for the loader to have a batch ready.
    """

    made: list[Made] = field(default_factory=list)
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


def settle(open_ones: list[Made], copies: int) -> None:
    """Find the loss of some updates: one sum over all ranks, and the host waits for the device.

    Every rank must bring the same updates. ``copies``: ranks that compute the same losses, the
    size of the tensor-parallel group.
    """
    if not open_ones:
        return
    sums = torch.stack([made.loss_sum for made in open_ones])
    if dist.is_initialized():
        dist.all_reduce(sums)
    for made, total in zip(open_ones, sums.tolist(), strict=True):
        made.loss = total / copies / max(1, made.targets)
