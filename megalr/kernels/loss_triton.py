"""Triton kernels of the loss over a vocabulary, and of its gradients' elementwise work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 16384, 16
"""Columns that a program processes at a time, and its warps."""

FLAT_BLOCK, FLAT_WARPS = 2048, 4
"""Numbers that a program of the elementwise kernels processes, and its warps."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _loss_and_gradient(logits, labels, nll, width, vocab_size, ignore, BLOCK: tl.constexpr):
    """One row: its -log softmax(z)[label]; z is replaced by softmax(z) - onehot(label).

    The kernel is bound by arithmetic, not by memory: one exponential per number and pass, and the
    label's column is handled outside the loops.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    kept = label != ignore
    start = logits + row * width
    target = tl.load(start + tl.where(kept, label, 0)).to(tl.float32)
    largest = float("-inf")  # of log2(e) z, so far
    total = 0.0
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(z, axis=0) * LOG2E)
        # The maximum ignores NaN, the sum does not. If all numbers so far are -inf the sum becomes
        # NaN too: no logit of a model is -inf.
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(z * LOG2E - larger), axis=0)
        largest = larger
    log_sum = largest + tl.log2(total)
    loss = log_sum / LOG2E - target
    tl.store(nll + row, tl.where(kept, loss, 0.0))
    weight = tl.where(kept, 1.0, 0.0)
    for first in range(0, width, BLOCK):  # padded columns included: their gradient is 0
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        gradient = tl.exp2(z * LOG2E - log_sum) * weight
        tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < width)
    tl.debug_barrier()  # rewrite the label's column after all threads have written
    gradient = tl.exp2(target * LOG2E - log_sum) - 1.0
    tl.store(start + label, gradient.to(logits.dtype.element_ty), mask=kept)


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


@triton.jit
def _add(total, part, result, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(total + place, mask=inside).to(tl.float32)
    value += tl.load(part + place, mask=inside).to(tl.float32)
    tl.store(result + place, value, mask=inside)


@triton.jit
def _times(x, factor, result, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(x + place, mask=inside).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(result + place, value.to(result.dtype.element_ty), mask=inside)


def add(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``total + part``, float32, in total's memory if that is float32; both contiguous."""
    wide = total.dtype == torch.float32
    result = total if wide else torch.empty_like(total, dtype=torch.float32)
    grid = (triton.cdiv(total.numel(), FLAT_BLOCK),)
    _add[grid](total, part, result, total.numel(), BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS)
    return result


def times(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``factor x`` as ``dtype``; x is contiguous."""
    result = torch.empty_like(x, dtype=dtype)
    grid = (triton.cdiv(x.numel(), FLAT_BLOCK),)
    _times[grid](x, factor, result, x.numel(), BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS)
    return result
