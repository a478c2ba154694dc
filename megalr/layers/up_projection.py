"""The products with the factors B of a group of matrices, as one operator.

Written as ``F.linear(h_i, scale * B_i)``, a compiled model spends 2 % of a 1B step outside the
products: it scales B and its gradient in separate kernels, keeps the scaled copies, and copies the
gradients of the h_i to place them side by side. Here the scale is the alpha of the GEMM, applied to
the float32 sum, and every product is written to its final place.

Matrices of one size may be multiplied as one strided batch: the outputs are then one tensor,
(G, ..., m), and so are their gradients. One launch of G times as many tiles fills the device better
than G short launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megalr.kernels import operator
from megalr.layers.latent_residual import LatentResidual

# Written out because torch 2.6 infers no schema from a returned list[Tensor].
SCHEMA = (
    "(Tensor h, Tensor b, SymInt[] sizes, float scale, bool stacked, SymInt[] runs, "
    "float[] offsets) -> Tensor[]"
)

NO_RUNS, NO_OFFSETS = [0], [0.0]
"""Without offsets of B. Not empty: torch takes an empty list for one of tensors."""

MANY_ROWS = 1280
"""Rows m from which the gradients of the B_i are one batch too. They sum over all tokens: with few
rows cuBLAS splits a product along the sum to fill the device, but a batch less well. On an H200 a
batch gained 3 to 10 % at 1408, 2048, 2752 and 5504 rows and lost 3 and 8 % at 1024 and 512.
"""


@operator("up_project", schema=SCHEMA)
def up_project(
    h: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    scale: float,
    stacked: bool,
    runs: Sequence[int],
    offsets: Sequence[float],
) -> list[Tensor]:
    """``y_i = scale h_i (B_i + E_i)^T`` for the G matrices of a group.

    B + E is formed before the products, here and in the backward pass, and kept in neither: one
    copy of the small B costs less than a pass over the outputs, and dB is that without E.

    Args:
        h: ``(..., G r)``, the bottlenecks h_i side by side.
        b: ``(sum m_i, r)``, the factors B_i stacked by rows.
        sizes: the m_i.
        scale: alpha / r.
        stacked: return the outputs as one tensor; all m_i must be equal.
        runs, offsets: of each E_i ``copies, first, used`` and ``value`` (layers.latent_residual);
            :data:`NO_RUNS`, :data:`NO_OFFSETS`: E = 0.

    Returns:
        G tensors ``(..., m_i)``, or one, ``(G, ..., m)``, in the dtype of h.
    """
    b = _with_residuals(b, sizes, runs, offsets)
    groups, rank = len(sizes), b.shape[1]
    outputs = _empty_outputs(h, sizes, stacked)
    if stacked:
        y = outputs[0].view(groups, -1, sizes[0])
        _product(_by_matrix(h, groups, rank), b.view(groups, -1, rank).mT, scale, y)
        return outputs
    flat = h.reshape(-1, groups * rank)  # (N, G r)
    for y, h_i, b_i in zip(outputs, flat.split(rank, dim=1), b.split(sizes), strict=True):
        _product(h_i, b_i.t(), scale, y.view(-1, y.shape[-1]))
    return outputs


def _with_residuals(
    b: Tensor, sizes: Sequence[int], runs: Sequence[int], offsets: Sequence[float]
) -> Tensor:
    """The stack of the B_i + E_i; ``b`` itself where there are none."""
    if not any(offsets):
        return b
    b = b.clone()
    for index, (part, value) in enumerate(zip(b.split(list(sizes)), offsets, strict=True)):
        copies, first, used = runs[3 * index : 3 * index + 3]
        LatentResidual(copies, value, first, used).add_to(part)
    return b


def _empty_outputs(h: Tensor, sizes: Sequence[int], stacked: bool) -> list[Tensor]:
    if stacked:
        return [h.new_empty(len(sizes), *h.shape[:-1], sizes[0])]
    return [h.new_empty(*h.shape[:-1], size) for size in sizes]


def _by_matrix(h: Tensor, groups: int, rank: int) -> Tensor:
    """``h (..., G r)`` as ``(G, N, r)``, a view of ``(N, G r)``."""
    return h.reshape(-1, groups, rank).transpose(0, 1)


@torch.library.register_fake(up_project)
def _(h: Tensor, b: Any, sizes: Sequence[int], scale: Any, stacked: bool, *_: Any) -> list[Tensor]:
    return _empty_outputs(h, sizes, stacked)


@operator("up_project_backward")
def up_project_backward(
    grads: Sequence[Tensor],
    h: Tensor,
    b: Tensor,
    sizes: Sequence[int],
    scale: float,
    stacked: bool,
    runs: Sequence[int],
    offsets: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """``dh_i = scale dY_i (B_i + E_i)`` side by side and ``dB_i = scale dY_i^T h_i`` stacked."""
    b = _with_residuals(b, sizes, runs, offsets)
    groups, rank = len(sizes), b.shape[1]
    flat = h.reshape(-1, groups * rank)
    dh, db = torch.empty_like(flat), torch.empty_like(b)
    if stacked:
        dy = grads[0].reshape(groups, -1, sizes[0])  # (G, N, m)
        _product(dy, b.view(groups, -1, rank), scale, _by_matrix(dh, groups, rank))
        if sizes[0] >= MANY_ROWS:
            _product(dy.mT, _by_matrix(flat, groups, rank), scale, db.view(groups, -1, rank))
            return dh.view(h.shape), db
        dys = list(dy.unbind())
    else:
        dys = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # (N, m_i) each
        for dy, b_i, dh_i in zip(dys, b.split(sizes), dh.split(rank, 1), strict=True):
            _product(dy, b_i, scale, dh_i)
    for dy, h_i, db_i in zip(dys, flat.split(rank, 1), db.split(sizes), strict=True):
        _product(dy.t(), h_i, scale, db_i)
    return dh.view(h.shape), db


@torch.library.register_fake(up_project_backward)
def _(grads: Any, h: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(b)


def _product(x: Tensor, y: Tensor, scale: float, out: Tensor) -> None:
    """``out = scale x y`` of matrices or batches; earlier contents of ``out`` have no effect."""
    batch = x.dim() == 3
    if scale == 1.0:
        (torch.bmm if batch else torch.mm)(x, y, out=out)
    else:
        add = torch.baddbmm if batch else torch.addmm
        add(out, x, y, beta=0, alpha=scale, out=out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    h, b, ctx.sizes, ctx.scale, ctx.stacked, ctx.runs, ctx.offsets = inputs
    ctx.save_for_backward(h, b)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    h, b = ctx.saved_tensors
    if any(grad is None for grad in grads):
        zeros = [torch.zeros_like(y) for y in _empty_outputs(h, ctx.sizes, ctx.stacked)]
        grads = [zero if grad is None else grad for grad, zero in zip(grads, zeros, strict=True)]
    numbers = ctx.sizes, ctx.scale, ctx.stacked, ctx.runs, ctx.offsets
    dh, db = up_project_backward(grads, h, b, *numbers)
    return dh, db, None, None, None, None, None


torch.library.register_autograd(up_project, _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megalr.up_project)
def _flops(h: Any, b: Any, *_: Any, **__: Any) -> int:
    """Two for each multiplication; each h_i is multiplied by its own B_i only."""
    tokens = 1
    for size in h[:-1]:
        tokens *= size
    return 2 * tokens * b[0] * b[1]


@register_flop_formula(torch.ops.megalr.up_project_backward)
def _backward_flops(grads: Any, h: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(h, b)
