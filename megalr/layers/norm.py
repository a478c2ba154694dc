"""Norms whose input or whose gradient is spread over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalr.sharding.tensor_shard import TensorShard, part_of, set_shard
from megalr.tensor_parallel.collectives import Group, copy, reduce
from megalr.tensor_parallel.mesh import Mesh


@dataclass(frozen=True)
class DeferredRMSNorm:
    """A normalized vector without its factor 1/rms, which is not known on one rank alone.

    RMSNorm is a number a token times ``x * weight``, and a matrix may be applied before that
    number: ``A norm(x) = (A (x * weight)) / rms(x)``. So the sum of squares can travel together
    with the bottleneck, and no rank waits for it before its first product. Going back nothing is
    summed for it: the gradient of the scaled bottleneck is whole on every rank already.

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
        """``h / rms(x)`` for ``h = A (x * weight)`` summed over the group; float32 inside."""
        mean = reduce(self.squares, group) / self.width
        return _TimesFactor.apply(h, torch.rsqrt(mean + self.eps))


class _TimesFactor(torch.autograd.Function):
    """``y = h * factor`` with a float32 number a token, keeping y, which is kept anyway, but not h.

    ``factor (..., 1)`` is above 0, so its gradient, the sum of dy h, is that of dy y over factor.
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


class ShardedRMSNorm(nn.Module):
    """RMSNorm of a residual stream that is cut along the hidden dimension.

    Parameter ``weight (h/p,)``. The output is a :class:`DeferredRMSNorm`, which factorized
    layers read.

    Args:
        hidden_size: h, of the whole stream.
        eps: added to the mean square.
        mesh: the ranks.
    """

    def __init__(self, hidden_size: int, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        part = part_of(hidden_size, mesh.tensor_rank, mesh.tensor_size)
        self.weight = nn.Parameter(torch.ones(part[1] - part[0]))
        set_shard(self.weight, TensorShard((hidden_size,), rows=(part,)))

    def forward(self, x: torch.Tensor) -> DeferredRMSNorm:
        squares = x.float().square().sum(dim=-1, keepdim=True)  # (..., 1)
        return DeferredRMSNorm(x * self.weight, squares, self.hidden_size, self.eps)


class FinalNorm(nn.Module):
    """The norm before the head: RMSNorm or LayerNorm of a whole vector.

    The head is cut by vocabulary, so on each rank the gradient of this norm's output is a partial
    sum, and so is the gradient of its weight; the latter is summed here.

    Args:
        kind: ``rms`` or ``layer``.
        hidden_size: h.
        eps: epsilon.
        group: the ranks over which the head is cut.
    """

    def __init__(self, kind: str, hidden_size: int, eps: float, group: Group = None) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.group = group
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if kind == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = copy(self.weight, self.group)
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, copy(self.bias, self.group), self.eps)
