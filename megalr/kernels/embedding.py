"""The gradient of a table of embeddings: rows of equal ids are summed, in a fixed order.

torch sorts 64-bit ids in eight passes, of which ids of a vocabulary need two, and sums in two
kernels that take 0.2 to 0.5 ms at the shapes of docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalr.kernels import HAS_TRITON


def has_row_sums(table: Tensor) -> bool:
    """Whether the kernels run for it: half precision on a CUDA device, Triton."""
    return HAS_TRITON and table.is_cuda and table.dtype in (torch.bfloat16, torch.float16)


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """``weight[ids]``, its gradient by :func:`summed_rows`.

    Args:
        ids: ``(...,)`` int64, in ``[0, V)``.
        weight: ``(V, h)``.

    Returns:
        ``(..., h)``.
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

    Sums are float32 and rounded once, in a fixed order: the same bits every time. A number that is
    not finite may reach rows besides its own, since the kernels multiply by zero.
    """
    if has_row_sums(dy):
        from megalr.kernels.embedding_triton import sums

        small = torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32
        keys, order = torch.sort(ids.to(small), stable=True)
        return sums(keys, order, dy.contiguous(), rows)
    wide = torch.promote_types(dy.dtype, torch.float32)
    total = torch.zeros(rows, dy.shape[1], dtype=wide, device=dy.device)
    return total.index_add_(0, ids, dy.to(wide)).to(dy.dtype)
