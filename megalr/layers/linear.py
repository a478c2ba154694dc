"""Linear layers of the decoder: dense, and the base of factorized ones, grouped by input.

Every layer maps ``x (..., n)`` to a tuple with one output per logical matrix and implements
GroupedLinear: draw the weights, read or set a dense matrix, describe the factors.

Under tensor parallelism a layer holds the rows and columns that ``shape.spec`` assigns to its rank.
Whole weights are drawn from the run's seed and then sharded, so they do not depend on the number of
ranks.

Shapes: n inputs, m_i outputs of matrix i, r rank, G matrices in the group, p tensor-parallel ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalr.layers.deferred import DeferredRMSNorm, DeferredSwiGLU
from megalr.layers.factors import FactorPair, LinearShape, named_generator, set_row_blocks
from megalr.layers.latent_residual import LatentResidual
from megalr.layers.up_projection import NO_OFFSETS, NO_RUNS, up_project
from megalr.sharding.tensor_shard import set_shard
from megalr.tensor_parallel.collectives import copy, reduce


class GroupedLinear(nn.Module, ABC):
    """The matrices of one group: ``x (..., n)`` to one output ``(..., m_i)`` for each.

    The base of all kinds of layers. ``bias`` is the stack ``(sum m_i,)`` of the biases, or None.
    """

    def __init__(self, shape: LinearShape, bias: bool) -> None:
        super().__init__()
        self.shape = shape
        # Copies for forward: if it read ``shape``, which holds names, no two blocks would share
        # one compiled function.
        self.sizes = shape.local_out
        self.input_group = shape.spec.input_group
        self.output_group = shape.spec.output_group
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes))) if bias else None
        if self.bias is not None:
            set_shard(self.bias, shape.shard(columns=0))

    @abstractmethod
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw the weights from ``seed`` and the matrices' names; padding is zero."""

    @abstractmethod
    def dense_weight(self, index: int) -> torch.Tensor:
        """This rank's shard of the matrix W_index ``(m, n)`` without padding, float32.

        Raises:
            ValueError: both factors are sharded, so no rank can compute a part of their product.
            UserError: the layer's function is not a matrix.
        """

    @abstractmethod
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W_index to the whole ``weight (m, n)``, or to the layer's best approximation of it.

        Raises:
            UserError: the layer's function is not a matrix.
        """

    @abstractmethod
    def weight_count(self) -> int:
        """Numbers stored for the whole matrices on all ranks, without padding and biases.

        Each multiplies every token once.
        """

    def frozen_weight_count(self) -> int:
        """Those of ``weight_count`` that are not trained."""
        return 0

    def forward_stacked(self, x: Any) -> tuple[torch.Tensor, ...]:
        """The outputs as one tensor if the layer computes them so, for operators that take both.

        That is ``(..., sum m_i)`` side by side or ``(G, ..., m)``; else the G outputs. ``x`` as
        for forward.
        """
        outputs: tuple[torch.Tensor, ...] = self(x)
        return outputs

    def layer_of(self, index: int) -> tuple[GroupedLinear, int]:
        """The layer that stores matrix ``index``, and the matrix's index in there."""
        return self, index

    def used_rows(self, index: int) -> slice:
        """Rows of matrix ``index`` in this rank's stack, without padding."""
        start, _ = self.shape.row_ranges()[index]
        local = self.shape.local_rows(index)
        return slice(start, start + local.stop - local.start)

    def used_columns(self) -> slice:
        """Columns on this rank, without padding."""
        local = self.shape.local_columns()
        return slice(0, local.stop - local.start)

    def local_part(self, index: int, weight: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the whole unpadded ``weight (m, n)`` of matrix ``index``."""
        return weight[self.shape.local_rows(index), self.shape.local_columns()]

    def dense_output(self, x: torch.Tensor | DeferredSwiGLU, weight: torch.Tensor) -> torch.Tensor:
        """``x W^T (+ bias)`` for the local stack W, summed over ranks; ``(..., sum m_i)``."""
        if isinstance(x, torch.Tensor):
            x = copy(x, self.output_group)
            if self.input_group is None:
                return F.linear(x, weight, self.bias)
        y = reduce(_multiply(x, weight), self.input_group)
        return y if self.bias is None else y + self.bias  # once, not by every rank

    @torch.no_grad()
    def draw_dense(self, seed: int, std: float, device: torch.device) -> None:
        """Set every matrix to a draw from N(0, std^2) that depends on neither ranks nor padding."""
        for index, name in enumerate(self.shape.names):
            draw = torch.empty(self.shape.out_used[index], self.shape.in_used, device=device)
            draw.normal_(0.0, std, generator=named_generator(seed, name, device))
            self.load_dense(index, draw)
            del draw  # before the next one is allocated

    def factor_pairs(self) -> list[FactorPair]:
        """The factorized matrices of this layer; none for a dense layer."""
        return []

    def stored_matrix(self, index: int) -> dict[str, torch.Tensor]:
        """What is stored of matrix ``index`` in factorized form, whole and without padding.

        ``a (r, n)`` and ``b (m, r)``, the scale included, float32, and what is added to ``b a``:
        ``base (m, n)``, or ``values`` at ``positions`` (row n + column, int64). Empty for a dense
        layer.
        """
        return {}

    def extra_repr(self) -> str:
        return (
            f"in={self.shape.in_used}, out={list(self.shape.out_used)}, "
            f"bias={self.bias is not None}"
        )


def _multiply(x: torch.Tensor | DeferredSwiGLU, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T``."""
    return x.linear(weight) if isinstance(x, DeferredSwiGLU) else F.linear(x, weight)


class DenseLinear(GroupedLinear):
    """``y_i = x W_i^T (+ b_i)`` for the matrices of one group, in one GEMM.

    Parameter ``weight`` is ``(sum m_i, n)``: the matrices W_i stacked by rows. Under tensor
    parallelism (arXiv 1909.08053) n numbers per token are summed in the backward pass where W is
    sharded by rows, m in the forward pass where it is sharded by columns.

    Args:
        shape: sizes of the group.
        bias: adds a vector to each output.
    """

    def __init__(self, shape: LinearShape, bias: bool = False) -> None:
        super().__init__(shape, bias)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), shape.local_in))
        set_row_blocks(self.weight, shape.names, shape.row_ranges())
        set_shard(self.weight, shape.shard())

    def forward(self, x: torch.Tensor | DeferredSwiGLU) -> tuple[torch.Tensor, ...]:
        """``x (..., n)`` to the outputs ``(..., m_i)``."""
        return self.dense_output(x, self.weight).split(self.sizes, dim=-1)

    def forward_stacked(self, x: Any) -> tuple[torch.Tensor, ...]:
        """The outputs side by side, ``(..., sum m_i)``, as the GEMM leaves them."""
        return (self.dense_output(x, self.weight),)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw every W_i from N(0, std^2); padding is zero."""
        self.weight.zero_()
        self.draw_dense(seed, std, self.weight.device)

    def dense_weight(self, index: int) -> torch.Tensor:
        """This rank's shard of W_index ``(m, n)`` without padding, float32."""
        return self.weight.detach()[self.used_rows(index), self.used_columns()].float()

    @torch.no_grad()
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W_index to the whole ``weight (m, n)``."""
        part = self.local_part(index, weight)
        self.weight[self.used_rows(index), self.used_columns()].copy_(part)

    def weight_count(self) -> int:
        """n m_i for each matrix."""
        return sum(self.shape.in_used * m for m in self.shape.out_used)


class FactorizedLinear(GroupedLinear):
    """Base of the layers with factors A_i (r x n), B_i (m_i x r) for the matrices of one group.

    Parameters: ``a (G r, n)`` stacks the G factors A_i, which read the same x and run as one GEMM;
    ``b (sum m_i, r)`` stacks the factors B_i.

    Under tensor parallelism A is sharded by columns where the input is sharded, B by rows where the
    outputs are, and G r numbers per token are summed: ``x A^T`` in the forward pass in the first
    case, its gradient in the backward pass in the second. A factor that is not sharded has the same
    gradient on all ranks (docs/parallelism.md).

    Args:
        shape: sizes of the group.
        rank: r, at most min(m, n) of every matrix of the group.
        alpha: numerator of the scale alpha / r.
        bias: adds a dense vector to each output.
        dlr_alpha: B_i + E_i takes the place of B_i (layers.latent_residual); None: E = 0.

    Attributes:
        form: what the layer computes from its factors, one of hf.modeling_factorized.FORMS.
    """

    form = "product"

    def __init__(
        self,
        shape: LinearShape,
        rank: int,
        alpha: float,
        bias: bool = False,
        dlr_alpha: float | None = None,
    ) -> None:
        super().__init__(shape, bias)
        self.rank = rank
        self.scale = alpha / rank
        self.residuals = [
            LatentResidual.of(rows, rank, dlr_alpha, shape.local_rows(index))
            for index, rows in enumerate(shape.out_used)
            if dlr_alpha is not None
        ]
        # For forward, as plain numbers; see GroupedLinear.
        self.runs = [n for e in self.residuals for n in (e.copies, e.first, e.used)] or NO_RUNS
        self.offsets = [e.value for e in self.residuals] or NO_OFFSETS
        stacked = len(shape.names) * rank
        self.a = nn.Parameter(torch.empty(stacked, shape.local_in))
        self.b = nn.Parameter(torch.empty(sum(self.sizes), rank))
        self.mark_factors()
        set_shard(self.a, shape.shard(rows=stacked))
        set_shard(self.b, shape.shard(columns=rank))

    def mark_factors(self) -> None:
        """Record on ``a`` and ``b`` which rows are whose; copies and wrappers lose the marks."""
        names = self.shape.names
        set_row_blocks(self.a, tuple(f"{n}.A" for n in names), self._a_ranges())
        set_row_blocks(self.b, tuple(f"{n}.B" for n in names), self.shape.row_ranges())

    def _a_ranges(self) -> list[tuple[int, int]]:
        return [(i * self.rank, (i + 1) * self.rank) for i in range(len(self.shape.names))]

    def bottleneck(self, x: torch.Tensor | DeferredRMSNorm | DeferredSwiGLU) -> torch.Tensor:
        """``x A_i^T`` for the whole input, side by side, ``(..., G r)``, the same on all ranks."""
        if isinstance(x, DeferredRMSNorm):
            h = reduce(F.linear(x.values, self.a), self.input_group)
            return x.scaled(h, self.input_group)
        return reduce(_multiply(x, self.a), self.input_group)

    def low_rank_outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``scale (x A_i^T) B_i^T`` for every matrix, ``(..., m_i)`` each; no bias."""
        h = copy(self.bottleneck(x), self.output_group)
        return tuple(up_project(h, self.b, self.sizes, self.scale, False, NO_RUNS, NO_OFFSETS))

    def outputs_from(self, h: torch.Tensor, stacked: bool = False) -> tuple[torch.Tensor, ...]:
        """``scale h_i B_i^T (+ bias_i)`` for the bottlenecks ``h (..., G r)``, ``(..., m_i)`` each.

        ``stacked``: as one tensor ``(G, ..., m)``, for matrices of one size without biases.
        """
        h = copy(h, self.output_group)
        outputs = up_project(h, self.b, self.sizes, self.scale, stacked, self.runs, self.offsets)
        if self.bias is None:
            return tuple(outputs)
        biases = self.bias.split(self.sizes)
        return tuple(y + bias for y, bias in zip(outputs, biases, strict=True))

    def used_factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of this rank's shards of A_index (r, n) and B_index (m, r), without padding."""
        a_start = index * self.rank
        a = self.a.detach()[a_start : a_start + self.rank, self.used_columns()]
        return a, self.b.detach()[self.used_rows(index)]

    def used_product(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, n) and B + E (m, r), whose product times the scale is W, float32 copies."""
        a, b = (factor.to(torch.float32, copy=True) for factor in self.used_factors(index))
        return a, self.residuals[index].add_to(b) if self.residuals else b

    def stored_matrix(self, index: int) -> dict[str, torch.Tensor]:
        """``a (r, n)`` and ``b (m, r)`` times the scale, in float32."""
        a, b = self.used_product(index)
        return {"a": a, "b": self.scale * b}

    @torch.no_grad()
    def load_factors(self, index: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Set the factors from the whole unpadded A (r, n) and B (m, r) of matrix ``index``."""
        local_a, local_b = self.used_factors(index)
        local_a.copy_(a[:, self.shape.local_columns()])
        local_b.copy_(b[self.shape.local_rows(index)])

    def dense_weight(self, index: int) -> torch.Tensor:
        """This rank's shard of ``scale * B A``, without padding, multiplied in float32.

        Raises:
            ValueError: both factors are sharded, so no rank can compute a part of their product.
        """
        if self.input_group is not None and self.output_group is not None:
            raise ValueError(f"{self.shape.names[index]}: both factors are sharded over ranks")
        a, b = self.used_product(index)
        return self.scale * (b @ a)

    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set the factors to the best rank-r approximation of ``weight (m, n)``, balanced.

        That is the truncated SVD in float64, the root of the singular values in either factor.
        """
        u, s, vh = torch.linalg.svd(weight.double() / self.scale, full_matrices=False)
        root = s[: self.rank].sqrt()
        b = u[:, : self.rank] * root
        if self.residuals:
            whole = replace(self.residuals[index], first=0, used=len(b))
            whole.add_to(b, -1.0)
        self.load_factors(index, root[:, None] * vh[: self.rank], b)

    def weight_count(self) -> int:
        """r (n + m_i) for each matrix."""
        return sum((self.shape.in_used + m) * self.rank for m in self.shape.out_used)

    def factor_pairs(self) -> list[FactorPair]:
        """The factor pairs of this group, in order."""
        columns, spec = self.shape.local_in, self.shape.spec
        return [
            FactorPair(name, self.b, b_rows, self.a, a_rows, self.scale, columns, spec, residual)
            for name, b_rows, a_rows, residual in zip(
                self.shape.names,
                self.shape.row_ranges(),
                self._a_ranges(),
                self.residuals or (None,) * len(self.sizes),
                strict=True,
            )
        ]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


class BottleneckLinear(FactorizedLinear):
    """A layer that is two factors and nothing else: only r numbers per matrix pass through."""

    def forward(
        self, x: torch.Tensor | DeferredRMSNorm | DeferredSwiGLU
    ) -> tuple[torch.Tensor, ...]:
        """``x (..., n)`` to the outputs ``(..., m_i)``."""
        return self.outputs_from(self.bottleneck(x))

    def forward_stacked(self, x: Any) -> tuple[torch.Tensor, ...]:
        """One tensor ``(G, ..., m)`` if the matrices have one size and no biases; else G."""
        if self.bias is not None or len(set(self.sizes)) > 1:
            return super().forward_stacked(x)
        return self.outputs_from(self.bottleneck(x), stacked=True)
