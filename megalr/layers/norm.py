"""Norms whose input or whose gradient is distributed over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalr.layers.deferred import DeferredRMSNorm
from megalr.sharding.tensor_shard import TensorShard, set_shard, shard_range
from megalr.tensor_parallel.collectives import copy
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


class FinalNorm(nn.Module):
    """The norm before the head: RMSNorm or LayerNorm of the whole vector.

    The head is sharded by vocabulary, so on each rank the gradient of this norm's output is a
    partial sum. So is the gradient of its weight, which is summed here.

    Args:
        kind: ``rms`` or ``layer``.
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
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if kind == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., h)`` to ``(..., h)``, normalized over the last dimension."""
        weight = copy(self.weight, self.group)
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, copy(self.bias, self.group), self.eps)
