"""The products with B of a group of factorized matrices, as one operator.

Written as ``F.linear(h_i, scale * B_i)`` a compiled model spends 2 % of a 1B step on what is no
product: it scales B and its gradient in kernels of their own, keeps the scaled copies, and lays the
gradients of the h_i side by side by a copy. Here the scale is the GEMM's own factor, applied to the
float32 sum, and every product is written where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Written out because torch 2.6 infers no schema from list[Tensor] as what is returned.
SCHEMA = "(Tensor h, Tensor b, SymInt[] sizes, float scale) -> Tensor[]"


@torch.library.custom_op("megalr::expand", mutates_args=(), schema=SCHEMA)
def expand(h: Tensor, b: Tensor, sizes: Sequence[int], scale: float) -> list[Tensor]:
    """``y_i = scale h_i B_i^T`` for the G matrices of a group.

    Args:
        h: ``(..., G r)``, the bottlenecks h_i side by side.
        b: ``(sum m_i, r)``, the factors B_i stacked by rows.
        sizes: the m_i.
        scale: alpha / r.

    Returns:
        G tensors ``(..., m_i)``, in the dtype of h.
    """
    flat = h.reshape(-1, h.shape[-1])  # (N, G r)
    outputs = [h.new_empty(*h.shape[:-1], size) for size in sizes]
    for y, h_i, b_i in zip(outputs, flat.split(b.shape[1], dim=1), b.split(sizes), strict=True):
        _product(h_i, b_i.t(), scale, y.view(-1, y.shape[-1]))
    return outputs


@expand.register_fake
def _(h: Tensor, b: Tensor, sizes: Sequence[int], scale: float) -> list[Tensor]:
    return [h.new_empty(*h.shape[:-1], size) for size in sizes]


@torch.library.custom_op("megalr::expand_backward", mutates_args=())
def expand_backward(
    grads: Sequence[Tensor], h: Tensor, b: Tensor, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """``dh_i = scale dY_i B_i`` side by side and ``dB_i = scale dY_i^T h_i`` stacked."""
    rank = b.shape[1]
    flat = h.reshape(-1, h.shape[-1])
    dh, db = torch.empty_like(flat), torch.empty_like(b)
    parts = zip(
        grads, flat.split(rank, 1), b.split(sizes), dh.split(rank, 1), db.split(sizes), strict=True
    )
    for grad, h_i, b_i, dh_i, db_i in parts:
        dy = grad.reshape(-1, grad.shape[-1])  # (N, m_i)
        _product(dy, b_i, scale, dh_i)
        _product(dy.t(), h_i, scale, db_i)
    return dh.view(h.shape), db


@expand_backward.register_fake
def _(
    grads: Sequence[Tensor], h: Tensor, b: Tensor, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(b)


def _product(x: Tensor, y: Tensor, scale: float, out: Tensor) -> None:
    """``out = scale x y``; what is in ``out`` before does not matter."""
    if scale == 1.0:
        torch.mm(x, y, out=out)
    else:
        torch.addmm(out, x, y, beta=0, alpha=scale, out=out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    h, b, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(h, b)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor, Tensor, None, None]:
    h, b = ctx.saved_tensors
    given = [
        h.new_zeros(*h.shape[:-1], size) if grad is None else grad
        for grad, size in zip(grads, ctx.sizes, strict=True)
    ]
    dh, db = expand_backward(given, h, b, ctx.sizes, ctx.scale)
    return dh, db, None, None


expand.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.megalr.expand)
def _flops(h: Any, b: Any, *_: Any, **__: Any) -> int:
    """Two a multiplication; every h_i meets its own B_i."""
    tokens = 1
    for size in h[:-1]:
        tokens *= size
    return 2 * tokens * b[0] * b[1]


@register_flop_formula(torch.ops.megalr.expand_backward)
def _backward_flops(grads: Any, h: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(h, b)
