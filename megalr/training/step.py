"""One optimizer step on a global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalr.data.loader import UpdateBatch
from megalr.engine.build import data_parallel_ranks, set_learning_rate, set_update
from megalr.engine.skip_step import DeferredSkip, poison_nonfinite
from megalr.engine.wrappers import wrapper_of


@dataclass
class StepResult:
    """One update, made or skipped.

    Attributes:
        update: updates done, this one included.
        batch: number of its batch.
        targets: of the global batch.
        samples: samples of the global batch by source of the data.
        learning_rate: of all groups.
        loss_sum: this rank's sum over its targets, on the device.
        norm: global norm of the gradient before clipping; infinite or NaN where it was not finite.
            On the device until :meth:`PendingMetrics.wait`.
        skipped: whether nothing was changed; a DeferredSkip until :attr:`applied` is read.
        spike: it was skipped because its loss is a spike.
        loss: mean per target over all ranks; None until :meth:`PendingMetrics.wait`.
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
        """Whether the host knows if the update was skipped."""
        return not isinstance(self.skipped, DeferredSkip)

    @property
    def applied(self) -> bool:
        """Whether weights and moments were changed; waits for the update unless it is known."""
        if isinstance(self.skipped, DeferredSkip):
            self.skipped = self.skipped.read()
        return not self.skipped


def train_step(
    engine: Any,
    batch: UpdateBatch,
    update: int,
    learning_rate: float,
    reject: Callable[[StepResult], bool] | None = None,
) -> StepResult:
    """Forward, backward and optimizer step; a bad update is skipped on all ranks.

    Bad is a loss or gradient that is not finite, and an update that ``reject`` rejects. The host
    waits for the device only if DeepSpeed or ``reject`` does. The gradient is that of the mean loss
    per target over the global batch, whatever the number of ranks and micro-batches: each adds its
    summed loss divided by the global number of targets, times the ranks that the engine averages.

    Args:
        engine: DeepSpeed's engine around a Decoder.
        batch: this rank's micro-batches.
        update: number of the update, from 1 on.
        learning_rate: of all groups.
        reject: called on every rank before the last backward pass, when ``loss_sum`` is complete;
            must return the same everywhere. None: nothing but non-finite numbers is bad.
    """
    device, targets = engine.device, batch.num_targets
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    samples = batch.samples_by_source
    result = StepResult(update, batch.update, targets, samples, learning_rate, loss_sum)
    set_learning_rate(engine, learning_rate)
    set_update(engine, update)
    scale = data_parallel_ranks(engine) / max(1, targets)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        loss = engine(*(t.to(device, non_blocking=True) for t in micro_batch), scale=scale)
        result.loss_sum += loss.detach() / scale
        if number == len(batch.micro_batches) and reject is not None:
            result.spike = reject(result)
            if result.spike:
                loss = loss * float("nan")
        if batch.error is not None:  # this rank alone knows; so that all skip the update
            loss = loss * float("nan")
        # A new tensor: on the very output of the engine, DeepSpeed's hook divides by the number of
        # micro-batches in spite of scale_wrt_gas (docs/dev/deepspeed-notes.md).
        engine.backward(poison_nonfinite(loss), scale_wrt_gas=False)
        engine.step()
    result.norm, skipped = wrapper_of(engine).step_result()
    result.skipped = skipped if isinstance(skipped, bool) else DeferredSkip(engine, skipped)
    return result
