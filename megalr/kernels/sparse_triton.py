"""Triton kernels that add to and read scattered entries of a dense array, without atomics.

They need positions that do not repeat, which is what PyTorch's ``index_add_`` cannot assume: two
programs never touch the same entry, so a load, an add and a store do what atomics do there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Entries of a program: 8 a thread, enough loads under way to hide their latency."""


@triton.jit
def _scatter_add_kernel(dense, places, values, count, BLOCK: tl.constexpr):
    # int64, because the last block may reach beyond 2^31 where count does not.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    targets = dense + tl.load(places + offsets, mask=inside, other=0)
    before = tl.load(targets, mask=inside, other=0).to(tl.float32)
    added = tl.load(values + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(targets, (before + added).to(dense.dtype.element_ty), mask=inside)


@triton.jit
def _gather_kernel(dense, places, values, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    sources = dense + tl.load(places + offsets, mask=inside, other=0)
    tl.store(values + offsets, tl.load(sources, mask=inside, other=0), mask=inside)


def scatter_add_(dense: Tensor, places: Tensor, values: Tensor) -> None:
    """``dense.flat[places] += values``, summed in float32 and rounded once.

    Args:
        dense: contiguous, fewer than 2^31 entries, bfloat16, float16 or float32.
        places: ``(nnz,)`` int32 flat positions, none twice.
        values: ``(nnz,)`` of the dtype of ``dense``.
    """
    _launch(_scatter_add_kernel, dense, places, values.contiguous())


def gather(dense: Tensor, places: Tensor) -> Tensor:
    """``dense.flat[places]``, ``(nnz,)``; arguments as of ``scatter_add_``."""
    values = torch.empty(places.shape, dtype=dense.dtype, device=dense.device)
    _launch(_gather_kernel, dense, places, values)
    return values


def _launch(kernel: triton.JITFunction, dense: Tensor, places: Tensor, values: Tensor) -> None:
    count = places.numel()
    if count == 0:  # a rank may hold no entry; a grid of no programs cannot be launched
        return
    with torch.cuda.device_of(dense):  # Triton launches on the current device, not the tensor's
        kernel[(triton.cdiv(count, BLOCK),)](dense, places.contiguous(), values, count, BLOCK=BLOCK)
