"""The gradient of an embedding table: rows of equal ids are summed in a fixed order.

torch sorts 64-bit ids in eight passes, where ids of a vocabulary need two, and sums in two kernels
that take 0.2 to 0.5 ms at the shapes of benchmarks/lab/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalr.kernels import half_on_gpu, widened


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """``weight[ids]``, with its gradient by :func:`summed_rows`.

    Args:
        ids: ``(...,)`` int64, in ``[0, V)``.
        weight: ``(V, h)``.

    Returns:
        ``(..., h)``, in the dtype of weight.
    """
    return _Lookup.apply(ids, weight)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        dy = grads[0].reshape(ids.numel(), -1)
        return None, summed_rows(ids.reshape(-1), dy, ctx.rows)


def summed_rows(ids: Tensor, dy: Tensor, rows: int) -> Tensor:
    """``dW[v] = sum of dy[i] over ids[i] = v``, ``(rows, h)`` in the dtype of dy.

    Args:
        ids: ``(N,)`` integers in ``[0, rows)``.
        dy: ``(N, h)``.
        rows: V.

    Sums are float32, in a fixed order, and rounded once: the same bits on every run. A number that
    is not finite may also reach other rows, since the kernels multiply by zero.
    """
    if half_on_gpu(dy):
        from megalr.kernels.embedding_triton import sums

        small = torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32
        keys, order = torch.sort(ids.to(small), stable=True)
        return sums(keys, order, dy.contiguous(), rows)
    terms = widened(dy)
    return terms.new_zeros(rows, dy.shape[1]).index_add_(0, ids, terms).to(dy.dtype)
