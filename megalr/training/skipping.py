"""How an update is left out on all ranks: by a gradient that no engine accepts.

Every wrapper that DeepSpeed puts around an optimizer looks for a non-finite gradient, on all ranks
together, and then makes no update (docs/deepspeed-notes.md); the host waits for that answer in any
case. Plain float32 without ZeRO has no wrapper; there the same is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def guarded(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` times 1, or times NaN if it is not finite; a tensor of its own.

    So a non-finite loss gives a non-finite gradient, even where the derivative alone would be
    finite, without the host having to look. A finite loss and its gradient stay bitwise.
    """
    value = loss.detach()
    return loss * (1 + (value - value))


def finite_everywhere(value: torch.Tensor) -> bool:
    """Whether ``value`` is finite on all ranks; every rank must call it. The host waits."""
    bad = (~torch.isfinite(value)).any().float()
    if dist.is_initialized():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)


def forget_gradients(optimizer: Any) -> None:
    """Drop the gradients of a step that DeepSpeed's ZeRO-1 or 2 has skipped with CPU offload.

    It drops them itself without offload. With it and bf16 their sums stay, the next micro-batches
    are added, and no step is ever made again (docs/deepspeed-notes.md).
    """
    if getattr(optimizer, "cpu_offload", False):
        for group in getattr(optimizer, "averaged_gradients", {}):
            optimizer.averaged_gradients[group] = None


@contextmanager
def withheld(optimizer: Any) -> Iterator[None]:
    """While open, ``optimizer.step`` changes nothing and the engine counts a skipped step.

    For a torch optimizer that is the engine's own (float32 without ZeRO): the engine asks an
    attribute ``overflow`` whether the step was made, which only its wrappers have.
    """
    optimizer.step = lambda *_, **__: None
    optimizer.overflow = True
    try:
        yield
    finally:
        del optimizer.step, optimizer.overflow
