"""Inputs of a linear layer whose last elementwise step is applied inside that layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megalr.kernels.swiglu import swiglu_product
from megalr.tensor_parallel.collectives import reduce
from megalr.tensor_parallel.mesh import Group


@dataclass(frozen=True)
class DeferredSwiGLU:
    """``silu(gate) up``, not computed yet: fused with the product of the layer that reads it.

    Attributes:
        projections: gate and up ``(..., f)`` each, or one tensor of both (kernels.swiglu).
    """

    projections: tuple[torch.Tensor, ...]

    def linear(self, weight: torch.Tensor) -> torch.Tensor:
        """``(silu(gate) up) W^T`` for ``weight (m, f)``, ``(..., m)``."""
        return swiglu_product(list(self.projections), weight)


@dataclass(frozen=True)
class DeferredRMSNorm:
    """A normalized vector without its factor 1/rms, which one rank alone does not know.

    RMSNorm is one number per token times ``x * weight``, and a matrix may be applied before that
    number: ``A norm(x) = (A (x * weight)) / rms(x)``. The sum of squares can therefore travel
    together with the bottleneck, and no rank waits for it before its first product. The backward
    pass needs no sum: the gradient of the scaled bottleneck is complete on every rank.

    Attributes:
        values: ``x * weight (..., h/p)`` of this rank.
        squares: ``(..., 1)`` float32, sum of squares of this rank's part of x.
        width: h.
        eps: epsilon of the norm.
    """

    values: torch.Tensor
    squares: torch.Tensor
    width: int
    eps: float

    def scaled(self, h: torch.Tensor, group: Group) -> torch.Tensor:
        """``h / rms(x)`` for ``h = A (x * weight)``, ``(..., r)``, summed over the group.

        Computed in float32, in the dtype of h.
        """
        mean = reduce(self.squares, group) / self.width
        return _ScaleRows.apply(h, torch.rsqrt(mean + self.eps))


class _ScaleRows(torch.autograd.Function):
    """``y = h * factor`` with one float32 number per token. Keeps y, which is kept anyway, not h.

    ``factor (..., 1)`` is positive, so its gradient, the sum of dy h, is that of dy y over factor.
    """

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        y = h.float() * factor
        if y.dtype != h.dtype:  # compiled by torch 2.11, a conversion to the same loses gradients
            y = y.to(h.dtype)
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        y, factor = ctx.saved_tensors
        dy = grads[0].float()
        dfactor = (dy * y.float()).sum(dim=-1, keepdim=True) / factor
        return (dy * factor).to(y.dtype), dfactor


def values_of(x: torch.Tensor | DeferredRMSNorm) -> torch.Tensor:
    """A tensor with the device, dtype and shape of a layer's input."""
    return x if isinstance(x, torch.Tensor) else x.values
