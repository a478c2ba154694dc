"""One optimizer update on a global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megalr.data.loader import UpdateBatch
from megalr.engine.build import gradient_norm, set_learning_rate
from megalr.engine.skip_step import drop_offloaded_gradients, poison_nonfinite
from megalr.training.step_log import HostCopy, StepResult


class Updater:
    """Makes updates with an engine; leaves out, on all ranks, those that are bad.

    Bad is a loss or gradient that is not finite, and what ``reject`` refuses.

    Args:
        engine: DeepSpeed's engine around a Decoder.
        device: where this rank computes.
        refuse: asked on every rank before the last backward pass of an update, when
            ``loss_sum`` is complete; must answer alike everywhere. None: not asked.
    """

    def __init__(
        self, engine: Any, device: torch.device, refuse: Callable[[StepResult], bool] | None
    ) -> None:
        self.engine = engine
        self.device = device
        self.reject = refuse

    def make(self, batch: UpdateBatch, update: int, learning_rate: float) -> StepResult:
        """Forward, backward and step of the batch; ``update`` is its number from 1 on.

        The gradient is that of the mean loss per target over the global batch, whatever the
        number of ranks and micro-batches: each micro-batch contributes its summed loss divided by
        the global number of targets, times the number of ranks because the engine averages over
        them.
        """
        engine = self.engine
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        targets, samples = batch.num_targets, batch.samples_by_source
        made = StepResult(update, batch.update, targets, samples, learning_rate, loss_sum)
        set_learning_rate(engine, learning_rate)
        scale = engine.dp_world_size / max(1, targets)
        for number, (input_ids, labels) in enumerate(batch.micro_batches, start=1):
            loss = engine(
                input_ids.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                scale,
            )
            made.loss_sum += loss.detach() / scale
            if number == len(batch.micro_batches) and self.reject is not None:
                made.spike = self.reject(made)
                if made.spike:
                    loss = loss * float("nan")
            # Guarded is a tensor of its own: on the very output of the engine, DeepSpeed's hook
            # divides by the number of micro-batches although it is told not to
            # (docs/dev/deepspeed-notes.md).
            engine.backward(poison_nonfinite(loss), scale_wrt_gas=False)
            engine.step()
        if engine.was_step_applied():  # as far as the engine knows
            left_out = getattr(engine.optimizer, "skipped", False)
            made.skipped = HostCopy(left_out) if isinstance(left_out, torch.Tensor) else left_out
        else:
            made.skipped = True
            drop_offloaded_gradients(engine.optimizer)
        made.norm = gradient_norm(engine)
        return made
