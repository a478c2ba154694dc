"""Drop-in replacements of ``nn.Linear`` that store factors: one tensor in, one tensor out.

They are the decoder's layers (:mod:`megalr.layers`) for a group of one matrix, without padding and
tensor parallelism. Under ``torch.autocast`` they compute in its dtype, as ``nn.Linear`` does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalr.layers.factors import LinearShape
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.layers.sparse_product import sparse_low_rank
from megalr.layers.up_projection import NO_OFFSETS, NO_RUNS, up_project

INITS = ("svd", "kaiming", "full_rank_variance", "orthogonal")
"""How factors start: from the weight that they replace, or as in pretraining
(docs/methods/factorized.md)."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear computes on ``x``: autocast's where it is on, that of x else."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class FactorLinear(LowRankLinear):
    """``y = (alpha/r) (x A^T) B^T (+ bias)`` in place of ``y = x W^T (+ bias)``.

    Parameters: ``a (r, n)``, ``b (m, r)``, and ``bias (m,)`` as the linear had it.

    Args:
        name: of the matrix in the model; random draws depend on it and on a seed.
        size: ``(m, n)`` of W.
        rank: r, from 1 to min(m, n).
        alpha: numerator of the scale alpha / r.
        init: draws of ``reset_parameters``, "kaiming", "full_rank_variance" or "orthogonal".
        bias: whether a vector is added.
        transposed: the linear stored its weight as (n, m), as GPT-2's does.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        rank: int,
        alpha: float,
        init: str,
        bias: bool,
        transposed: bool = False,
    ) -> None:
        super().__init__(_shape(name, size), rank, alpha, init, bias)
        self.out_features, self.in_features = size
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x (..., n)`` to ``y (..., m)``."""
        dtype = compute_dtype(x)
        h = F.linear(x.to(dtype), self.a.to(dtype))  # (..., r)
        (y,) = up_project(h, self.b.to(dtype), self.sizes, self.scale, False, NO_RUNS, NO_OFFSETS)
        return y if self.bias is None else y + self.bias.to(dtype)

    @property
    def weight(self) -> Tensor:
        """W = (alpha/r) B A ``(m, n)``, differentiable, for code that reads a linear's weight.

        ``(n, m)`` where the linear that was replaced stores it so.
        """
        return _as_stored(self, self.scale * self.b @ self.a)


class SparseFactorLinear(SLTrainLinear):
    """``y = x ((alpha/r) B A + S)^T (+ bias)``: SLTrain in place of ``y = x W^T (+ bias)``.

    Parameters: those of :class:`FactorLinear` and ``values (nnz,)``; buffer: ``support (nnz,)``
    int32, the positions of S in W, drawn from ``seed`` and ``name``.

    Args:
        name, size, rank, alpha, bias, transposed: as in FactorLinear.
        density: share of the entries of W that are in S, in (0, 1).
        seed: of the support.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        rank: int,
        alpha: float,
        density: float,
        seed: int,
        bias: bool,
        transposed: bool = False,
    ) -> None:
        super().__init__(_shape(name, size), rank, alpha, density, seed, bias)
        self.out_features, self.in_features = size
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x (..., n)`` to ``y (..., m)``."""
        dtype = compute_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, n)
        b, a, values = (p.to(dtype) for p in (self.b, self.a, self.values))
        y = sparse_low_rank(flat, b, a, values, self.support, self.sizes, self.scale)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    @property
    def weight(self) -> Tensor:
        """W = (alpha/r) B A + S ``(m, n)``, differentiable; as in :class:`FactorLinear`."""
        product = self.scale * self.b @ self.a
        whole = product.flatten().index_add(0, self.support, self.values.to(product.dtype))
        return _as_stored(self, whole.view_as(product))


LibraryLinear = FactorLinear | SparseFactorLinear


def _shape(name: str, size: tuple[int, int]) -> LinearShape:
    m, n = size
    return LinearShape((name,), n, (m,), n, (m,))


def _as_stored(layer: LibraryLinear, weight: Tensor) -> Tensor:
    return weight.mT if layer.transposed else weight


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, ``y = x W + bias`` with W (n, m), recognised without importing it."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def size_of(linear: Any) -> tuple[int, int]:
    """``(m, n)``: outputs and inputs of a linear of any kind."""
    if is_conv1d(linear):
        n, m = linear.weight.shape
        return m, n
    return linear.out_features, linear.in_features


def make_linear(
    linear: nn.Module,
    name: str,
    rank: int,
    *,
    alpha: float,
    density: float | None,
    init: str,
    seed: int,
) -> LibraryLinear:
    """A layer without weights yet, of the sizes, dtype and device of ``linear``; shares its bias.

    ``linear`` is an ``nn.Linear`` or transformers' ``Conv1D``. ``density`` None: no sparse part.
    """
    weight: Any = linear.weight
    transposed, size = not isinstance(linear, nn.Linear), size_of(linear)
    layer: LibraryLinear
    with torch.device(weight.device):
        if density is None:
            layer = FactorLinear(name, size, rank, alpha, init, False, transposed)
        else:
            layer = SparseFactorLinear(name, size, rank, alpha, density, seed, False, transposed)
    layer.to(weight.dtype).requires_grad_(weight.requires_grad).train(linear.training)
    layer.bias = linear.bias  # type: ignore[assignment]
    return layer
