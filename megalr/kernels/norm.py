"""The sum of two terms of the residual stream and its RMSNorm (arXiv 1910.07467), as one operator.

``total = x + added``, ``y = weight total / sqrt(mean total^2 + eps)``. Compiled by torch, the
gradient of the weight takes three kernels after the one that forms the gradient of the input: zeros
for a counter, a sum over 1024 partial sums, a conversion. Here it takes one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalr.kernels import half_on_gpu, operator, widened

WIDEST = 8192
"""Widest vector that a program of the kernels can hold in registers."""


def add_norm_applies(x: Tensor) -> bool:
    """Whether the operator uses its kernels for x: half precision on a CUDA device, with Triton."""
    return half_on_gpu(x) and x.shape[-1] <= WIDEST


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + added`` and its RMSNorm.

    Args:
        x: ``(..., h)``.
        added: as x.
        weight: ``(h,)``.
        eps: added to the mean square.

    Returns:
        ``total`` and ``y``, ``(..., h)`` in the dtype of x. y is the norm of the rounded sum,
        computed in float32 (float64 inputs: float64) and rounded once.
    """
    total, y, _ = torch.ops.megalr.add_norm(x, added, weight, eps)
    return total, y


@operator("add_norm")
def _add_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Also the factor ``1 / sqrt(mean total^2 + eps)`` of each vector, ``(...,)``."""
    if add_norm_applies(x):
        from megalr.kernels.norm_triton import add_norm_forward

        total, y, factor = add_norm_forward(_rows(x), _rows(added), weight, eps)
        return total.view(x.shape), y.view(x.shape), factor.view(x.shape[:-1])
    total = x + added
    exact = widened(total)
    factor = torch.rsqrt(exact.square().mean(dim=-1) + eps)
    y = (exact * factor.unsqueeze(-1) * widened(weight)).to(x.dtype)
    return total, y, factor


@torch.library.register_fake(_add_norm)
def _(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    factor = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), factor


@operator("add_norm_backward")
def _add_norm_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of x, which is also that of added, and of weight, summed in float32.

    With ``n = factor total`` and ``g = weight dy``: ``dx = dtotal + factor (g - n mean(g n))`` and
    ``dweight = sum over vectors of dy n``.
    """
    if add_norm_applies(total):
        from megalr.kernels.norm_triton import add_norm_backward

        dx, dweight = add_norm_backward(
            _rows(dtotal), _rows(dy), _rows(total), weight, factor.reshape(-1)
        )
        return dx.view(total.shape), dweight
    scale = factor.unsqueeze(-1)
    n, d = widened(total) * scale, widened(dy)
    g = d * widened(weight)
    dx = widened(dtotal) + scale * (g - n * (g * n).mean(dim=-1, keepdim=True))
    dweight = (d * n).flatten(0, -2).sum(dim=0)
    return dx.to(total.dtype), dweight.to(weight.dtype)


@torch.library.register_fake(_add_norm_backward)
def _(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), torch.empty_like(weight)


def _rows(x: Tensor) -> Tensor:
    """``(N, h)``, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    total, _, factor = output
    ctx.save_for_backward(total, inputs[2], factor)


def _backward(ctx: Any, dtotal: Tensor, dy: Tensor, _: Any) -> tuple[Any, ...]:
    total, weight, factor = ctx.saved_tensors
    dx, dweight = torch.ops.megalr.add_norm_backward(dtotal, dy, total, weight, factor)
    return dx, dx, dweight, None


torch.library.register_autograd(_add_norm, _backward, setup_context=_setup_context)
