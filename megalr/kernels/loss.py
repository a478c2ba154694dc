"""Cross entropy over a vocabulary and its gradient in one kernel, in the logits' own memory.

torch compiles the PyTorch reference to two kernels, which read 512 MiB of logits twice and reached
2.4 TB/s on an H200; here the second read of a row comes from the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megalr.kernels import HAS_TRITON

IGNORE = -100
"""Label of a position that has no target."""


def has_fused_loss(device: torch.device) -> bool:
    """Whether the kernels run there: a CUDA device, and Triton is installed."""
    return device.type == "cuda" and HAS_TRITON


def fused_loss_and_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Summed negative log likelihood of a chunk; ``logits`` are replaced by its gradient.

    Args:
        logits: ``(T, V)`` contiguous; columns from ``vocab_size`` on are padding and take no
            probability. On return d sum / d logits: zero in rows without target and in padding.
        labels: ``(T,)`` int64, ``IGNORE`` where a row has no target.

    Returns:
        ``sum -log softmax(logits)[label]``, float32 scalar; NaN or inf if a logit is.
    """
    from megalr.kernels.loss_triton import rows_

    return rows_(logits, labels, vocab_size, IGNORE).sum()


def loss_and_gradient_reference_(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """PyTorch reference of :func:`fused_loss_and_gradient_`; same arguments and result."""
    z = logits.float()  # fused into the reductions when compiled
    column = torch.arange(logits.shape[1], device=logits.device)
    if vocab_size < logits.shape[1]:
        z = z.masked_fill(column >= vocab_size, float("-inf"))
    log_sum = torch.logsumexp(z, dim=-1, keepdim=True)  # (T, 1)
    kept = labels != IGNORE
    target = torch.where(kept, labels, 0).unsqueeze(1)  # (T, 1)
    nll = (log_sum - z.gather(1, target)).squeeze(1)
    gradient = torch.exp(z - log_sum) - (column == target).float()
    logits.copy_(torch.where(kept.unsqueeze(1), gradient, 0.0))
    return torch.where(kept, nll, 0.0).sum()


def add_float32(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``total + part`` in float32, in total's memory if that is float32; both contiguous."""
    from megalr.kernels.loss_triton import add

    return add(total, part)


def scale_float32(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``factor x``, computed in float32 and rounded once to ``dtype``; x is contiguous.

    Args:
        x: any shape.
        factor: a number, as a tensor.
        dtype: of the result.
    """
    from megalr.kernels.loss_triton import times

    return times(x, factor, dtype)


def _add_reference(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return total.float().add_(part)


def _scale_reference(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() * factor).to(dtype)


class GradientOps(NamedTuple):
    """Elementwise work on gradients: :func:`add_float32`, :func:`scale_float32` or references."""

    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    scale: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


REFERENCE_OPS = GradientOps(_add_reference, _scale_reference)
TRITON_OPS = GradientOps(add_float32, scale_float32)
