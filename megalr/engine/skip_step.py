"""How an update is left out on all ranks: by a gradient that no engine accepts.

Every wrapper that DeepSpeed puts around an optimizer looks for a non-finite gradient, on all ranks
together, and then makes no update (docs/dev/deepspeed-notes.md); the host waits for it. Where
there is no wrapper :mod:`megalr.engine.unwrapped_step` does the same. torch's fused AdamW skips a
step inside its kernel: there the host need not wait, and a GPU goes on while Python prepares the
next update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def poison_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` times 1, or times NaN if it is not finite; a tensor of its own.

    So a non-finite loss gives a non-finite gradient, even where the derivative alone would be
    finite, without the host having to look. A finite loss and its gradient stay bitwise.
    """
    value = loss.detach()
    return loss * (1 + (value - value))


def not_finite_anywhere(value: torch.Tensor) -> torch.Tensor:
    """1 if the number ``value`` is inf or nan on some rank, else 0; float32, the same on all ranks.

    Every rank must call it. The host does not wait for the device.
    """
    bad = (~torch.isfinite(value)).float()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad


def supports_device_skip(base: torch.optim.Optimizer) -> bool:
    """Whether ``step`` of the optimizer can be told on the device to change nothing.

    Not before its first step, which would make moments even so.
    """
    fused = isinstance(base, torch.optim.AdamW) and all(g["fused"] for g in base.param_groups)
    return fused and bool(base.state)


def step_with_found_inf(
    base: torch.optim.Optimizer,
    bad: torch.Tensor,
    norm: torch.Tensor,
    limit: float,
    make_step: Callable[[], Any],
) -> None:
    """A step of a fused AdamW that changes nothing where ``bad`` is 1, clipped inside its kernel.

    The gradient is g / max(1, (norm + 1e-6) / limit), and g with a limit of 0. ``bad`` and
    ``norm`` are numbers on the device, which nobody waits for.
    """
    base.found_inf = bad  # type: ignore[attr-defined]
    scale = ((norm + 1e-6) / limit).clamp(min=1.0) if limit else None
    base.grad_scale = scale  # type: ignore[attr-defined]
    make_step()


def drop_offloaded_gradients(optimizer: Any) -> None:
    """Drop the gradients of a step that DeepSpeed's ZeRO-1 or 2 has skipped with CPU offload.

    It drops them itself without offload. With it and bf16 their sums stay, the next micro-batches
    are added, and no step is ever made again (docs/dev/deepspeed-notes.md).
    """
    if getattr(optimizer, "cpu_offload", False):
        for group in getattr(optimizer, "averaged_gradients", {}):
            optimizer.averaged_gradients[group] = None
