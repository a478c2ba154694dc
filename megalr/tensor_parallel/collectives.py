"""The four differentiable collectives of tensor parallelism.

Each is a pair: what happens to values going forward, and to gradients coming back.

| function | forward | backward | used where |
|---|---|---|---|
| copy | nothing | all-reduce | a value that is the same on all ranks enters cut weights |
| reduce | all-reduce | nothing | partial sums of cut weights become the same value on all ranks |
| gather | all-gather | reduce-scatter | a cut last dimension becomes whole before cut weights |
| scatter | reduce-scatter | all-gather | partial sums become a cut last dimension |

In ``reduce(copy(x))`` order both directions are summed. A group of None is a group of one: the
functions return their argument. ``group`` is passed in, never looked up.

The collectives are torch's functional ones, which make a new tensor. Those that write into their
argument must not be used inside compiled blocks: torch 2.11 traces them so that no gradient passes
(``tests/tensor_parallel/test_decoder.py`` compares gradients of compiled blocks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

_ops = torch.ops._c10d_functional
_done = _ops.wait_tensor


def copy(x: Tensor, group: Group) -> Tensor:
    """``x`` itself; its gradient is summed over the group."""
    return x if group is None else _Copy.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """``x`` summed over the group; the gradient, the same on all ranks, passes."""
    return x if group is None else _Reduce.apply(x, group)


def gather(x: Tensor, group: Group) -> Tensor:
    """``(..., n/p)`` of each of the p ranks to ``(..., n)``; gradients are summed and cut back."""
    return x if group is None else _Gather.apply(x, group)


def scatter(x: Tensor, group: Group) -> Tensor:
    """``(..., n)`` summed over the p ranks, of which this one keeps ``(..., n/p)``."""
    return x if group is None else _Scatter.apply(x, group)


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """``x`` reduced over the group (``sum``, ``max``), a new tensor; no gradient."""
    if group is None:
        return x.clone()
    return _done(_ops.all_reduce(x.contiguous(), op, group.group_name))


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(..., n/p)`` to ``(..., n)``."""
    size = dist.get_world_size(group)
    # The ranks' parts below one another.
    parts = _done(_ops.all_gather_into_tensor(x.contiguous(), size, group.group_name))
    return torch.cat(parts.split(x.shape[0]), dim=-1)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(..., n)`` to the sum's ``(..., n/p)``."""
    size = dist.get_world_size(group)
    parts = torch.cat(x.chunk(size, dim=-1))  # the ranks' parts below one another
    return _done(_ops.reduce_scatter_tensor(parts, "sum", size, group.group_name))


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
