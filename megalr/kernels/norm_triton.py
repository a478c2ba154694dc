"""Triton kernels of the residual sum and its RMSNorm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalr.kernels import multiprocessors

NUMBERS_PER_THREAD = 8
"""Numbers of a vector in one thread's registers: one 16-byte load in half precision."""

WARPS_PER_MULTIPROCESSOR = 32
"""In the backward pass; each program writes one partial sum of dweight."""

SUMMED_ROWS, SUMMED_COLUMNS = 256, 16
"""Partial sums and columns that a program of the last kernel processes at a time."""


@triton.jit
def _forward(x, added, weight, total, y, factor, width, eps, BLOCK: tl.constexpr):
    """One vector: the sum, rounded, and its norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    once: tl.constexpr = "evict_first"
    t = tl.load(x + place, mask=inside, other=0.0, eviction_policy=once).to(tl.float32)
    t += tl.load(added + place, mask=inside, other=0.0, eviction_policy=once).to(tl.float32)
    rounded = t.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=inside)
    t = rounded.to(tl.float32)
    f = tl.rsqrt(tl.sum(t * t, axis=0) / width + eps)
    tl.store(factor + row, f)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (t * f * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dtotal, dy, total, weight, factor, dx, partial, rows, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every P-th vector of P programs; their gradients of the weight are summed in registers."""
    first = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * width + column
        t = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        past = tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(factor + row)
        n = t * f
        dw += d * n
        g = d * w
        mean = tl.sum(g * n, axis=0) / width
        result = past + f * (g - n * mean)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + first * width + column, dw, mask=inside)


@triton.jit
def _columns(partial, dweight, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dweight = sum over the first of ``partial (count, width)``, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = inside & (row < count)[:, None]
        total += tl.load(partial + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(dweight.dtype.element_ty)
    tl.store(dweight + column, result, mask=column < width)


def add_norm_forward(
    x: Tensor, added: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and norm ``(N, h)``, factors ``(N,)`` float32; x and added are contiguous."""
    rows, width = x.shape
    total, y = torch.empty_like(x), torch.empty_like(x)
    factor = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, warps = _block_and_warps(width)
    _forward[(rows,)](x, added, weight, total, y, factor, width, eps, BLOCK=block, num_warps=warps)
    return total, y, factor


def add_norm_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of either term of the sum ``(N, h)``, and of the weight; inputs are contiguous."""
    rows, width = total.shape
    dx, dweight = torch.empty_like(total), torch.empty_like(weight)
    block, warps = _block_and_warps(width)
    count = min(rows, WARPS_PER_MULTIPROCESSOR // warps * multiprocessors(total.device))
    partial = torch.empty(count, width, dtype=torch.float32, device=total.device)
    _backward[(count,)](
        dtotal, dy, total, weight, factor, dx, partial, rows, width, BLOCK=block, num_warps=warps
    )
    _columns[(triton.cdiv(width, SUMMED_COLUMNS),)](
        partial, dweight, count, width, ROWS=SUMMED_ROWS, COLUMNS=SUMMED_COLUMNS, num_warps=8
    )
    return dx, dweight


def _block_and_warps(width: int) -> tuple[int, int]:
    """Columns of a program, the least power of two that holds a vector, and its warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // (32 * NUMBERS_PER_THREAD)))
