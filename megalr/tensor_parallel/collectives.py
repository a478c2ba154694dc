"""The four differentiable collectives of tensor parallelism (Megatron-LM, arXiv 1909.08053 §3).

Each is a pair, one operation on values in the forward pass and one on gradients in the backward:

| function | forward | backward | use |
|---|---|---|---|
| copy | none | all-reduce | a value that is equal on all ranks is read by sharded weights |
| reduce | all-reduce | none | partial sums of sharded weights become equal on all ranks |
| gather | all-gather | reduce-scatter | a sharded last dimension becomes whole |
| scatter | reduce-scatter | all-gather | partial sums become a sharded last dimension |

``reduce(copy(x))`` sums in both directions. A group of None is a group of one: the functions then
return their argument.

The collectives are torch's functional ones, which return a new tensor. In-place collectives must
not be used inside compiled blocks: torch 2.11 traces them so that no gradient passes
(``tests/tensor_parallel/test_decoder.py`` compares gradients of compiled blocks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.tensor_parallel.mesh import Group

_ops = torch.ops._c10d_functional
_wait = _ops.wait_tensor


def copy(x: Tensor, group: Group) -> Tensor:
    """``x`` unchanged; its gradient is summed over the group."""
    return x if group is None else _Copy.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """``x`` summed over the group; the gradient, equal on all ranks, passes unchanged."""
    return x if group is None else _Reduce.apply(x, group)


def gather(x: Tensor, group: Group) -> Tensor:
    """``(..., n/p)`` of the p ranks to ``(..., n)``; gradients are summed and sharded back."""
    return x if group is None else _Gather.apply(x, group)


def scatter(x: Tensor, group: Group) -> Tensor:
    """``(..., n)`` summed over the p ranks, of which this one keeps ``(..., n/p)``."""
    return x if group is None else _Scatter.apply(x, group)


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """``x`` reduced over the group by ``op`` (``sum``, ``max``) in a new tensor; no gradient."""
    if group is None:
        return x.clone()
    return _wait(_ops.all_reduce(x.contiguous(), op, group.group_name))


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(..., n/p)`` to ``(..., n)``."""
    size = dist.get_world_size(group)
    # (p * first, ..., n/p): the ranks' shards concatenated along the first dimension.
    parts = _wait(_ops.all_gather_into_tensor(x.contiguous(), size, group.group_name))
    return torch.cat(parts.split(x.shape[0]), dim=-1)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(..., n)`` to this rank's ``(..., n/p)`` of the sum."""
    size = dist.get_world_size(group)
    parts = torch.cat(x.chunk(size, dim=-1))  # (p * first, ..., n/p)
    return _wait(_ops.reduce_scatter_tensor(parts, "sum", size, group.group_name))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _reduce_scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _all_gather(grads[0], ctx.group), None
