"""SLTrain: ``W = (alpha/r) B A + S`` with S sparse on a fixed random support (METHODS §7)."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from megalr.layers.factors import LinearShape, named_generator, set_row_blocks
from megalr.layers.linear import FactorizedLinear


def draw_support(seed: int, name: str, rows: int, columns: int, density: float) -> np.ndarray:
    """``floor(density m n)`` positions of an m x n matrix, without replacement, ascending.

    A position is ``row * columns + column``, int64. The draw depends on the seed and the name
    only: not on device, ranks or padding.
    """
    digest = hashlib.sha256(f"{seed}:{name}.support".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    count = int(density * rows * columns)
    return np.sort(generator.choice(rows * columns, count, replace=False, shuffle=False))


class _SparsePlusLowRank(torch.autograd.Function):
    """``y = x W^T`` with ``W = B A + S``, keeping x, the factors and the values, but no W.

    Backward rebuilds W once and forms ``D = dY^T X`` once: ``dX = dY W``, ``dB = D A^T``,
    ``dA = B^T D``, ``dv = D[support]``. Transients: W and D, each ``(sum m_i, n)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        values: torch.Tensor,
        support: torch.Tensor,
        sizes: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, b, a, values, support)
        ctx.sizes = sizes
        return x @ dense(b, a, values, support, sizes).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        x, b, a, values, support = ctx.saved_tensors
        sizes, rank = ctx.sizes, b.shape[1]
        dx = dy @ dense(b, a, values, support, sizes)  # (N, n)
        d = dy.t() @ x  # (sum m_i, n)
        parts = list(zip(d.split(sizes), b.split(sizes), a.split(rank), strict=True))
        db = torch.cat([d_i @ a_i.t() for d_i, _, a_i in parts])
        da = torch.cat([b_i.t() @ d_i for d_i, b_i, _ in parts])
        return dx, db, da, d.view(-1).index_select(0, support), None, None


def dense(
    b: torch.Tensor,
    a: torch.Tensor,
    values: torch.Tensor,
    support: torch.Tensor,
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """The stack ``(sum m_i, n)`` of ``B_i A_i``, plus the values at their positions."""
    parts = zip(b.split(sizes), a.split(b.shape[1]), strict=True)
    w = torch.cat([b_i @ a_i for b_i, a_i in parts])
    return w.view(-1).index_add_(0, support, values).view_as(w)


class SLTrainLinear(FactorizedLinear):
    """``y_i = x ((alpha/r) B_i A_i + S_i)^T (+ bias_i)`` for the matrices of one group.

    Parameters: the factors ``a (G r, n)`` and ``b (sum m_i, r)``, and ``values (sum nnz_i,)`` of
    the sparse parts. Buffer: ``support (sum nnz_i,)`` int32, positions in the stack of the
    matrices as stored. S is not scaled by alpha/r.

    Args:
        shape: sizes of the group.
        rank: r.
        alpha: numerator of the scale.
        density: delta, share of the positions of a matrix that S has, in (0, 1).
        seed: seed of the run; it gives the support.
        bias: adds a dense vector to each output.
    """

    support: torch.Tensor

    def __init__(
        self,
        shape: LinearShape,
        rank: int,
        alpha: float,
        density: float,
        seed: int,
        bias: bool = False,
    ) -> None:
        super().__init__(shape, rank, alpha, bias)
        stored, self.counts = [], []
        for name, rows, (start, _) in zip(
            shape.names, shape.out_used, shape.row_ranges(), strict=True
        ):
            drawn = draw_support(seed, name, rows, shape.in_used, density)
            row, column = np.divmod(drawn, shape.in_used)
            stored.append((row + start) * shape.in_features + column)
            self.counts.append(len(drawn))
        positions = torch.from_numpy(np.concatenate(stored).astype(np.int32))
        self.register_buffer("support", positions.to(self.a.device))
        self.values = nn.Parameter(torch.empty(len(positions)))
        ends = np.cumsum([0, *self.counts]).tolist()
        ranges = list(itertools.pairwise(ends))
        set_row_blocks(self.values, tuple(f"{n}.S" for n in shape.names), ranges)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = self.a if self.scale == 1.0 else self.a * self.scale
        y = _SparsePlusLowRank.apply(
            x.reshape(-1, x.shape[-1]), self.b, a, self.values, self.support, self.sizes
        )
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1).split(self.sizes, dim=-1)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """A ~ U(+-1/sqrt(n)), B = 0, values ~ U(+-1/sqrt(n)): at the start W = S."""
        self.a.zero_()
        self.b.zero_()
        bound = 1 / math.sqrt(self.shape.in_used)
        parts = self.values.split(self.counts)
        for index, name in enumerate(self.shape.names):
            a, _ = self.used_factors(index)
            draw = torch.empty(a.shape, device=a.device)
            generator = named_generator(seed, f"{name}.A", a.device)
            a.copy_(draw.uniform_(-bound, bound, generator=generator))
            generator = named_generator(seed, f"{name}.S", a.device)
            parts[index].uniform_(-bound, bound, generator=generator)

    def sparse_weight(self, index: int) -> torch.Tensor:
        """S_index without padding as a dense float32 matrix, ``(m, n)``."""
        stack = torch.zeros(sum(self.sizes), self.shape.in_features, device=self.values.device)
        stack.view(-1).index_add_(0, self.support, self.values.detach().float())
        return stack[self.used_rows(index), : self.shape.in_used]

    def dense_weight(self, index: int) -> torch.Tensor:
        """``scale * B A + S`` of one matrix without padding, float32, ``(m, n)``."""
        return super().dense_weight(index) + self.sparse_weight(index)

    @torch.no_grad()
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Best rank-r approximation of ``weight``, then the support takes its share of the rest."""
        super().load_dense(index, weight)
        rest = weight.to(self.values) - super().dense_weight(index)
        stack = torch.zeros(sum(self.sizes), self.shape.in_features, device=self.values.device)
        stack[self.used_rows(index), : self.shape.in_used] = rest.to(stack)
        chosen = slice(sum(self.counts[:index]), sum(self.counts[: index + 1]))
        self.values[chosen] = stack.view(-1)[self.support[chosen].long()].to(self.values)
