"""``y = x (scale B A + S)^T`` as an operator that is opaque to torch.compile (SLTrain).

If traced, forward and backward both compute W = scale B A + S; the partitioner notices and keeps W
of every layer between them, all the memory that the factors were meant to save. Custom operators
keep their inputs and nothing else, compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megalr.kernels import operator

MAX_ENTRIES = 2**31
"""Positions are int32: a stack of matrices must have fewer entries than this."""

_ARGUMENTS = "Tensor x, Tensor b, Tensor a, Tensor values, Tensor support, int[] sizes, float scale"


@operator("sparse_low_rank", schema=f"({_ARGUMENTS}) -> Tensor")
def sparse_low_rank(
    x: Tensor,
    b: Tensor,
    a: Tensor,
    values: Tensor,
    support: Tensor,
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    """``y = x W^T`` for the stack W of ``W_i = scale B_i A_i + S_i``, differentiable.

    The backward pass rebuilds W once and forms ``D = dY^T X`` once: ``dX = dY W``,
    ``dB_i = scale D_i A_i^T``, ``dA_i = scale B_i^T D_i``, ``dvalues = D.flat[support]``. It keeps
    the arguments. Transients: W, then D, each ``(sum m_i, n)``.

    Args:
        x: ``(N, n)``.
        b: ``(sum m_i, r)``, the factors B_i stacked by rows.
        a: ``(G r, n)``, the factors A_i stacked by rows.
        values: ``(nnz,)``, the entries of all S_i.
        support: ``(nnz,)`` int32, their flat positions in the stack ``(sum m_i, n)``, none twice.
        sizes: the m_i.
        scale: factor of the products B_i A_i. The product in float32 is scaled before it is
            rounded, so no scaled copy of a factor is made or kept.

    Returns:
        ``(N, sum m_i)`` in the dtype of ``x``, which all float tensors share.

    Raises:
        ValueError: the stack has 2^31 entries or more.
    """
    return x @ dense_stack(b, a, values, support, sizes, scale).t()


@operator(
    "sparse_low_rank_backward",
    schema=f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def sparse_low_rank_backward(
    dy: Tensor,
    x: Tensor,
    b: Tensor,
    a: Tensor,
    values: Tensor,
    support: Tensor,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, db, da, dvalues)`` of ``sparse_low_rank`` for ``dy (N, sum m_i)``."""
    return gradients(dy, x, b, a, values, support, sizes, scale)


def gradients(
    dy: Tensor,
    x: Tensor,
    b: Tensor,
    a: Tensor,
    values: Tensor,
    support: Tensor,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sparse_low_rank_backward`` as ordinary PyTorch calls."""
    dx = dy @ dense_stack(b, a, values, support, sizes, scale)  # (N, n); W is free again
    d = dy.t() @ x  # (sum m_i, n)
    return dx, *factor_gradients(d, b, a, sizes, scale), d.view(-1).index_select(0, support)


def factor_gradients(
    d: Tensor, b: Tensor, a: Tensor, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """``dB_i = scale D_i A_i^T`` and ``dA_i = scale B_i^T D_i``, stacked like the factors."""
    db, da = b.new_empty(b.shape), a.new_empty(a.shape)
    for rows, inner in _blocks(sizes, b.shape[1]):
        _scaled_product(d[rows], a[inner].t(), scale, out=db[rows])
        _scaled_product(b[rows].t(), d[rows], scale, out=da[inner])
    return db, da


def dense_stack(
    b: Tensor, a: Tensor, values: Tensor, support: Tensor, sizes: Sequence[int], scale: float
) -> Tensor:
    """The stack ``(sum m_i, n)`` of ``scale B_i A_i + S_i``, computed in one buffer.

    Raises:
        ValueError: it has 2^31 entries or more.
    """
    w = b.new_empty(b.shape[0], a.shape[1])
    if w.numel() >= MAX_ENTRIES:
        raise ValueError(f"int32 positions cannot address {w.numel()} entries of {tuple(w.shape)}")
    for rows, inner in _blocks(sizes, b.shape[1]):
        _scaled_product(b[rows], a[inner], scale, out=w[rows])
    w.view(-1).index_add_(0, support, values)
    return w


def _blocks(sizes: Sequence[int], rank: int) -> Iterator[tuple[slice, slice]]:
    """For each matrix its rows in the stack, and the rows of its A in the stack of factors A."""
    start = 0
    for index, rows in enumerate(sizes):
        yield slice(start, start + rows), slice(index * rank, (index + 1) * rank)
        start += rows


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """``out = scale left right`` in one GEMM; contents of ``out``, NaN included, have no effect."""
    torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


@torch.library.register_fake(sparse_low_rank)
def _(x: Tensor, b: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@torch.library.register_fake(sparse_low_rank_backward)
def _(dy: Tensor, x: Tensor, b: Tensor, a: Tensor, values: Tensor, *_: Any) -> Any:
    return (
        x.new_empty(x.shape),
        b.new_empty(b.shape),
        a.new_empty(a.shape),
        values.new_empty(values.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    grads = sparse_low_rank_backward(dy, *ctx.saved_tensors, ctx.sizes, ctx.scale)
    return (*grads, None, None, None)


torch.library.register_autograd(sparse_low_rank, _backward, setup_context=_setup_context)


def _dense_flops(x: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """FLOPs of one product of the size of ``x W^T``, and of one of all ``B_i A_i``."""
    return 2 * x[0] * x[1] * b[0], 2 * b[0] * b[1] * x[1]


# torch.utils.flop_counter cannot see inside a custom operator.
@register_flop_formula(torch.ops.megalr.sparse_low_rank)
def _forward_flops(x: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    tokens, factors = _dense_flops(x, b)
    return tokens + factors


@register_flop_formula(torch.ops.megalr.sparse_low_rank_backward)
def _backward_flops(
    dy: Sequence[int], x: Sequence[int], b: Sequence[int], *_: Any, **__: Any
) -> int:
    tokens, factors = _dense_flops(x, b)
    return 2 * tokens + 3 * factors
