"""Triton kernels of SwiGLU's elementwise part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCKS, WARPS = (1024, 512, 256), 4
"""Columns that a program may process, and its warps."""


@triton.jit
def _tile(width, BLOCK: tl.constexpr):
    """Row and columns of this program, and which columns are inside the row."""
    per_row = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    column = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < width


@triton.jit
def _forward(gate, up, hidden, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """hidden = silu(gate) up, in float32, rounded once; hidden is contiguous."""
    row, column, inside = _tile(width, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    h = g * tl.sigmoid(g) * u
    tl.store(hidden + row * width + column, h.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate, up, hidden, dgate, dup, gate_stride, up_stride, dgate_stride, dup_stride, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden, which holds its gradient, becomes silu(gate) up; dgate and dup are written."""
    row, column, inside = _tile(width, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    place = hidden + row * width + column
    d = tl.load(place, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    kind = hidden.dtype.element_ty
    tl.store(dup + row * dup_stride + column, (d * silu).to(kind), mask=inside)
    slope = s + silu * (1.0 - s)
    tl.store(dgate + row * dgate_stride + column, (d * u * slope).to(kind), mask=inside)
    tl.store(place, (silu * u).to(kind), mask=inside)


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) up`` of ``(N, f)`` tensors whose rows are contiguous."""
    hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width, block = _grid(gate, up)
    _forward[(rows * triton.cdiv(width, block),)](
        gate, up, hidden, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=WARPS
    )
    return hidden


def swiglu_backward_(
    gate: torch.Tensor,
    up: torch.Tensor,
    hidden: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
) -> None:
    """Write the gradients to ``dgate``, ``dup``; replace ``hidden``, its gradient, by its value."""
    rows, width, block = _grid(gate, up, dgate, dup)
    _backward[(rows * triton.cdiv(width, block),)](
        gate, up, hidden, dgate, dup, gate.stride(0), up.stride(0), dgate.stride(0),
        dup.stride(0), width, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


def _grid(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """Rows, their width, columns of a program; contiguous tensors count as one long row."""
    rows, width = tensors[0].shape
    if all(x.is_contiguous() for x in tensors):
        return 1, rows * width, BLOCKS[0]
    return rows, width, min(BLOCKS, key=lambda block: triton.cdiv(width, block) * block)
