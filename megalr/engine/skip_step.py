"""How a bad update is skipped on all ranks: all of it but the counting (megalr/training/health.py).

An update is bad if its loss or gradient is not finite on some rank, or if the loop rejects it.

1. :func:`poison_nonfinite` turns a loss that is not finite into a gradient that is not. The loop
   rejects an update by making its loss NaN.
2. The gradient norm, the same on all ranks, is then not finite, and nothing is changed. DeepSpeed's
   wrappers test it in their own ``step``. Where megalr makes the step (fp32 and paper_bf16 without
   ZeRO, ``BF16_Optimizer``) :func:`step_or_skip` tests it. The host waits for the answer, except
   with a fused AdamW, which skips inside its kernel, so a GPU goes on while Python prepares the
   next update.
3. ``step_result`` of the engine's adapter (engine.wrapper) gives the norm and whether the step was
   skipped: a bool, or a number on the device, which a :class:`DeferredSkip` reads later.
4. ``StepResult.applied`` (training.step) is what the loop asks; ``Health.count`` decides.

DeepSpeed's side of this is in docs/dev/deepspeed-notes.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class HostCopy:
    """Numbers of any shape on their way from the device to the host.

    ``read`` waits for what was launched before the copy; ``Tensor.item`` would also wait for
    everything launched since.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> torch.Tensor:
        """The numbers, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


class DeferredSkip:
    """Whether a step was skipped by the device, which the host does not know yet.

    The engine took the step for made; reading adds it to the engine's ``skipped_steps``.
    """

    def __init__(self, engine: Any, flag: torch.Tensor) -> None:
        self._engine = engine
        self._copy = HostCopy(flag)

    def read(self) -> bool:
        """The answer; waits for that update. Call it once."""
        skipped = bool(self._copy.read())
        self._engine.skipped_steps += skipped
        return skipped


def poison_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` times 1, or times NaN if it is not finite; a new tensor.

    So a non-finite loss gives a non-finite gradient, even where the derivative alone would be
    finite, without the host having to look. A finite loss and its gradient stay bitwise.
    """
    value = loss.detach()
    return loss * (1 + (value - value))


def step_or_skip(
    optimizer: Any,
    norm: torch.Tensor,
    limit: float,
    clip: Callable[[torch.Tensor], None],
    step: Callable[[], Any],
) -> None:
    """Clip and step, or change nothing if the gradient norm is not finite.

    The clipped gradient is g / max(1, (norm + 1e-6) / limit). Sets ``optimizer.overflow``, which
    the engine reads after the step: whether the host knows that the step was skipped. Sets
    ``optimizer.skipped`` for ``step_result``: the same, or 1 or 0 on the device, shape ().

    Args:
        optimizer: the engine's; a wrapper has the run's optimizer in its attribute ``optimizer``.
        norm: of the whole gradient, float32, shape (), the same on all ranks.
        limit: largest norm; 0: no clipping.
        clip: multiplies the gradients by min(1, limit / (norm + 1e-6)), given the norm on the host.
        step: the optimizer's own step.
    """
    base = getattr(optimizer, "optimizer", optimizer)
    if _skips_on_device(base):
        skipped = (~torch.isfinite(norm)).float()
        base.found_inf = skipped
        base.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0) if limit else None
        optimizer.overflow, optimizer.skipped = False, skipped
        step()
        return
    norm = norm.cpu()  # the host waits here
    optimizer.overflow = optimizer.skipped = not math.isfinite(norm)
    if optimizer.overflow:
        return
    if limit:
        clip(norm)
    step()


def _skips_on_device(base: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step can be skipped inside its kernel (``found_inf``).

    Not the first one, which would create moments even if it is skipped.
    """
    fused = isinstance(base, torch.optim.AdamW) and all(g["fused"] for g in base.param_groups)
    return fused and bool(base.state)
