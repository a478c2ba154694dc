"""Triton kernels that sum rows of equal keys.

Keys are sorted and split into chunks of equal length: a frequent key is no more work for one
program than rare ones. A chunk's runs of equal keys are summed by one product with a matrix of
zeros and ones. A run inside a chunk is a row of the result; a run that crosses chunks is left to a
second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, COLUMNS, WARPS = 32, 128, 2
"""Keys and columns of a program of the first kernel, and its warps."""

CHUNKS = 32
"""Chunks that a program of the second kernel sums at a time."""


@triton.jit
def _within_chunks(
    keys, order, dy, dw, leading, trailing, count, width,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the runs of a chunk; its first and last run may be parts of longer ones."""
    chunk = tl.program_id(0)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(keys + place, mask=place < count, other=-1).to(tl.int32)
    before = tl.load(keys + place - 1, mask=(place > 0) & (place <= count), other=-1).to(tl.int32)
    continued = tl.load(keys + chunk * CHUNK).to(tl.int32) == tl.load(
        keys + chunk * CHUNK - 1, mask=chunk > 0, other=-1
    ).to(tl.int32)
    following = tl.load(keys + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < count, other=-2).to(
        tl.int32
    )
    # Runs are numbered from 0; the first begins here or in a chunk before.
    run = tl.cumsum((key != before).to(tl.int32), axis=0) - tl.where(continued, 0, 1)
    number = tl.arange(0, CHUNK)
    member = (number[:, None] == run[None, :]) & (place < count)[None, :]  # (runs, keys)
    of_run = tl.max(tl.where(member, key[None, :], -1), axis=1)  # -1: no such run
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    source = tl.load(order + place, mask=place < count, other=0)
    mask = (place < count)[:, None] & inside
    value = tl.load(dy + source[:, None] * width + column[None, :], mask=mask, other=0.0)
    ones = tl.where(member, 1.0, 0.0).to(value.dtype)
    total = tl.dot(ones, value, input_precision="ieee")  # exact products, float32 sums
    first = continued & (number == 0)
    last = (of_run == following) & (first == 0)
    whole = (of_run >= 0) & (of_run != following) & (first == 0)
    target = dw + of_run.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, total.to(dw.dtype.element_ty), mask=whole[:, None] & inside)
    row = tl.zeros([CHUNK, 1], tl.int32) + chunk
    tl.store(leading + row * width + column[None, :], total, mask=first[:, None] & inside)
    tl.store(trailing + row * width + column[None, :], total, mask=last[:, None] & inside)


@triton.jit
def _across_chunks(
    keys, dw, leading, trailing, count, width,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The sum of the run that starts in this chunk and continues in the next, if there is one."""
    chunk = tl.program_id(0)
    start, end = chunk * CHUNK, (chunk + 1) * CHUNK
    before = tl.load(keys + start - 1, mask=start > 0, other=-1)
    key = tl.load(keys + end - 1, mask=end < count, other=-1)
    following = tl.load(keys + end, mask=end < count, other=-2)
    if (key == following) & (key != before):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        total = tl.load(trailing + chunk * width + column, mask=inside, other=0.0)
        later = chunk + 1
        found = CHUNKS
        while found == CHUNKS:
            rows = later + tl.arange(0, CHUNKS)
            head = tl.load(keys + rows * CHUNK, mask=rows * CHUNK < count, other=-2)
            same = head == key
            mask = same[:, None] & inside[None, :]
            parts = tl.load(leading + rows[:, None] * width + column[None, :], mask=mask, other=0.0)
            total += tl.sum(parts, axis=0)
            found = tl.sum(same.to(tl.int32), axis=0)
            later += CHUNKS
        target = dw + key.to(tl.int64) * width + column
        tl.store(target, total.to(dw.dtype.element_ty), mask=inside)


def sums(keys: Tensor, order: Tensor, dy: Tensor, rows: int) -> Tensor:
    """``(rows, h)``: row v is the sum of ``dy[order[i]]`` over ``keys[i] = v``.

    Args:
        keys: ``(N,)`` in ascending order, none negative.
        order: ``(N,)`` int64.
        dy: ``(N, h)``, contiguous, 16 or 32 bits a number.
        rows: more than the largest key.
    """
    count, width = dy.shape
    dw = torch.zeros(rows, width, dtype=dy.dtype, device=dy.device)
    chunks = triton.cdiv(count, CHUNK)
    if chunks:
        leading = torch.empty(chunks, width, dtype=torch.float32, device=dy.device)
        trailing = torch.empty_like(leading)
        grid = (chunks, triton.cdiv(width, COLUMNS))
        _within_chunks[grid](
            keys, order, dy, dw, leading, trailing, count, width,
            CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        _across_chunks[grid](
            keys, dw, leading, trailing, count, width,
            CHUNK=CHUNK, COLUMNS=COLUMNS, CHUNKS=CHUNKS, num_warps=WARPS,
        )  # fmt: skip
    return dw
