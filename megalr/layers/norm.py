"""Norms whose input or whose gradient is distributed over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalr.layers.deferred import DeferredRMSNorm
from megalr.sharding.tensor_shard import TensorShard, set_shard, shard_range
from megalr.tensor_parallel.collectives import all_reduce, copy
from megalr.tensor_parallel.mesh import Group, Mesh


class ShardedRMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) of a residual stream that is sharded along the hidden dimension.

    Parameter ``weight (h/p,)``. The output is a :class:`DeferredRMSNorm`, the input of factorized
    layers.

    Args:
        hidden_size: h, of the whole stream; the number p of ranks divides it.
        eps: added to the mean square.
        mesh: the ranks.
    """

    def __init__(self, hidden_size: int, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        part = shard_range(hidden_size, mesh.tensor_rank, mesh.tensor_size)
        self.weight = nn.Parameter(torch.ones(part[1] - part[0]))
        set_shard(self.weight, TensorShard((hidden_size,), rows=(part,)))

    def forward(self, x: torch.Tensor) -> DeferredRMSNorm:
        """``(..., h/p)`` of this rank; sums of squares in float32."""
        squares = x.float().square().sum(dim=-1, keepdim=True)  # (..., 1)
        return DeferredRMSNorm(x * self.weight, squares, self.hidden_size, self.eps)


class SummedRMSNorm(nn.Module):
    """RMSNorm of a vector that is sharded over ranks; they sum its squares at once.

    ``y = weight x / sqrt(mean x^2 + eps)`` for this rank's part of x, with the mean over the whole
    vector: one number per vector is summed over the ranks in either direction. Parameter ``weight
    (w/p,)``.

    Args:
        width: w, of the whole vector; the number p of ranks divides it.
        eps: added to the mean square.
        mesh: the ranks.
    """

    def __init__(self, width: int, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.group = mesh.tensor_group
        part = shard_range(width, mesh.tensor_rank, mesh.tensor_size)
        self.weight = nn.Parameter(torch.ones(part[1] - part[0]))
        set_shard(self.weight, TensorShard((width,), rows=(part,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., w/p)`` to the same shape and dtype, computed in float32 and rounded once."""
        return _SummedNorm.apply(x, self.weight, self.width, self.eps, self.group)


class _SummedNorm(torch.autograd.Function):
    """Keeps x in its dtype and one float32 number per vector.

    With ``f = 1 / sqrt(mean x^2 + eps)``, ``n = f x`` and ``g = weight dy``: ``dx = f (g - n mean(g
    n))``, where both means are sums over all ranks divided by w.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, width: int, eps: float, group: Group
    ) -> torch.Tensor:
        exact = x.float()
        mean = all_reduce(exact.square().sum(dim=-1, keepdim=True), group) / width  # (..., 1)
        factor = torch.rsqrt(mean + eps)
        ctx.save_for_backward(x, weight, factor)
        ctx.width, ctx.group = width, group
        return (exact * factor * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, factor = ctx.saved_tensors
        n, dy = x.float() * factor, grads[0].float()
        g = dy * weight.float()
        mean = all_reduce((g * n).sum(dim=-1, keepdim=True), ctx.group) / ctx.width
        dx = factor * (g - n * mean)
        dweight = (dy * n).flatten(0, -2).sum(dim=0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None


def rms_norm_of_shards(width: int, eps: float, mesh: Mesh) -> nn.RMSNorm | SummedRMSNorm:
    """RMSNorm of vectors of which each rank of ``mesh`` holds an equal part."""
    if mesh.tensor_size == 1:
        return nn.RMSNorm(width, eps=eps)
    return SummedRMSNorm(width, eps, mesh)


class HeadRMSNorm(nn.Module):
    """RMSNorm of every head by itself, with one weight for all heads (Qwen3, arXiv 2505.09388).

    Each rank normalizes its own heads, so its gradient of the weight is a partial sum, which is
    summed here.

    Args:
        head_width: D; parameter ``weight (D,)``.
        eps: added to the mean square.
        group: the ranks over which the heads are sharded.
    """

    def __init__(self, head_width: int, eps: float, group: Group = None) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., H D)``, heads side by side, to the same shape."""
        weight = copy(self.weight, self.group)
        heads = x.unflatten(-1, (-1, weight.shape[0]))  # (..., H, D)
        return F.rms_norm(heads, weight.shape, weight, self.eps).flatten(-2)


class FinalNorm(nn.Module):
    """The norm before the head: RMSNorm or LayerNorm of the whole vector.

    The head is sharded by vocabulary, so on each rank the gradient of this norm's output is a
    partial sum. So is the gradient of its weight, which is summed here.

    Args:
        kind: ``rmsnorm`` or ``layernorm``.
        hidden_size: h.
        eps: epsilon.
        group: the ranks over which the head is sharded.
    """

    def __init__(self, kind: str, hidden_size: int, eps: float, group: Group = None) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.group = group
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if kind == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., h)`` to ``(..., h)``, normalized over the last dimension."""
        weight = copy(self.weight, self.group)
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, copy(self.bias, self.group), self.eps)
