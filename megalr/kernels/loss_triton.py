"""Triton kernel of the loss over a vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 4
"""Columns that a program looks at together, and its warps."""


@triton.jit
def _loss_and_gradient(logits, labels, nll, width, vocab_size, ignore, BLOCK: tl.constexpr):
    """One row: its -log softmax(z)[label]; z is replaced by softmax(z) - onehot(label)."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * width
    # Largest and sum of exponentials so far, by lane: lanes meet once, after the loop.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, z)
        # A lane that has seen nothing yet has -inf - (-inf): its total is 0 all the same. The
        # larger of -inf and NaN is -inf, but NaN has been seen.
        seen = (larger > float("-inf")) | (z != z)
        total = tl.where(seen, total * tl.exp(largest - larger) + tl.exp(z - larger), 0.0)
        largest = larger
        target += tl.where(column == label, z, 0.0)
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    kept = label != ignore
    tl.store(nll + row, tl.where(kept, log_sum - tl.sum(target, axis=0), 0.0))
    for first in range(0, width, BLOCK):  # padded columns included: their gradient is 0
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - log_sum) - tl.where(column == label, 1.0, 0.0)
        gradient = tl.where(kept, gradient, 0.0)
        tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < width)


def rows_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    ignore: int,
    block: int = BLOCK,
    warps: int = WARPS,
) -> torch.Tensor:
    """``(T,)`` float32 losses of the rows; ``logits (T, V)``, contiguous, become the gradients."""
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _loss_and_gradient[(logits.shape[0],)](
        logits, labels, nll, logits.shape[1], vocab_size, ignore, BLOCK=block, num_warps=warps
    )
    return nll
