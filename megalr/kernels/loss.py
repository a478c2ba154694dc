"""Cross entropy over a vocabulary and its gradient in one kernel, in the logits' own memory.

Plain twin: ``layers.head.loss_and_gradient_``. Compiled by torch that becomes two kernels, which
read 512 MiB of logits twice and reached 2.4 TB/s on an H200; here the second reading of a row comes
from the cache.
"""

from __future__ import annotations

import torch

from megalr.kernels import HAS_TRITON

IGNORE = -100
"""Label of a position that has no target."""


def has_fused_loss(device: torch.device) -> bool:
    """Whether the kernel runs there: a CUDA device, and Triton, which comes with torch for it."""
    return device.type == "cuda" and HAS_TRITON


def fused_loss_and_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Summed negative log likelihood of a chunk; ``logits`` are replaced by its gradient.

    Args:
        logits: ``(T, V)`` contiguous; columns from ``vocab_size`` on are padding and take no
            probability. Afterwards d sum / d logits: zero in rows without target and in padding.
        labels: ``(T,)`` int64, ``IGNORE`` where a row has no target.

    Returns:
        ``sum -log softmax(logits)[label]``, float32 scalar; NaN or inf where a logit is.
    """
    from megalr.kernels.loss_triton import rows_

    return rows_(logits, labels, vocab_size, IGNORE).sum()


def added(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``total + part`` in float32, in total's memory if that is float32; both contiguous."""
    from megalr.kernels.loss_triton import add

    return add(total, part)


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``factor x``, computed in float32 and rounded once to ``dtype``; x is contiguous.

    Args:
        x: any shape.
        factor: a number, as a tensor.
        dtype: of the result.
    """
    from megalr.kernels.loss_triton import times

    return times(x, factor, dtype)
