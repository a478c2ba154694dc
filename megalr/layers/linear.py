"""Linear layers of the decoder: dense (full_rank) and factorized (low_rank), grouped by input.

Every layer maps ``x (..., n)`` to a tuple with one output per logical matrix and offers the same
interface: ``reset_parameters``, ``dense_weight``, ``load_dense`` and ``factor_pairs``.

Under tensor parallelism a layer holds the rows and columns that ``shape.spec`` says; weights are
drawn whole from the run's seed and cut, so they do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalr.layers.expansion import up_project
from megalr.layers.factors import FactorPair, LinearShape, named_generator, set_row_blocks
from megalr.layers.gated import DeferredSwiGLU, product
from megalr.layers.norm import DeferredRMSNorm
from megalr.sharding.tensor_shard import set_shard
from megalr.tensor_parallel.collectives import copy, reduce


class GroupedLinear(nn.Module, ABC):
    """The matrices of one group: ``x (..., n)`` to one output ``(..., m_i)`` for each.

    What the kinds of layers share; ``bias`` is the stack ``(sum m_i,)`` of the biases, or None.
    """

    def __init__(self, shape: LinearShape, bias: bool) -> None:
        super().__init__()
        self.shape = shape
        # Plain sizes for forward: a compiled forward that read names would not be shared by blocks.
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
        """What this rank holds of the matrix W_index without padding, float32, ``(m, n)``."""

    @abstractmethod
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W_index to the whole ``weight (m, n)``, or as near as the layer can come."""

    def forward_stacked(self, x: Any) -> tuple[torch.Tensor, ...]:
        """The outputs in one tensor if the layer has them so, for operators that take both forms.

        That is ``(..., sum m_i)`` side by side or ``(G, ..., m)``; else the G outputs. ``x`` is
        what forward takes.
        """
        outputs: tuple[torch.Tensor, ...] = self(x)
        return outputs

    def used_rows(self, index: int) -> slice:
        """Rows of matrix ``index`` in the stack held here, without padding."""
        start, _ = self.shape.row_ranges()[index]
        held = self.shape.held_rows(index)
        return slice(start, start + held.stop - held.start)

    def used_columns(self) -> slice:
        """Columns held here, without padding."""
        held = self.shape.held_columns()
        return slice(0, held.stop - held.start)

    def held_part(self, index: int, weight: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the whole unpadded ``weight (m, n)`` of matrix ``index``."""
        return weight[self.shape.held_rows(index), self.shape.held_columns()]

    def dense_output(self, x: torch.Tensor | DeferredSwiGLU, weight: torch.Tensor) -> torch.Tensor:
        """``x W^T (+ bias)`` for the stack W as held here, with its sums; ``(..., sum m_i)``."""
        if isinstance(x, torch.Tensor):
            x = copy(x, self.output_group)
            if self.input_group is None:
                return F.linear(x, weight, self.bias)
        y = reduce(product(x, weight), self.input_group)
        return y if self.bias is None else y + self.bias  # once, not by every rank

    @torch.no_grad()
    def draw_dense(self, seed: int, std: float, device: torch.device) -> None:
        """Load N(0, std^2) into every matrix, drawn whole and without padding.

        So the numbers depend on neither ranks nor padding.
        """
        for index, name in enumerate(self.shape.names):
            draw = torch.empty(self.shape.out_used[index], self.shape.in_used, device=device)
            draw.normal_(0.0, std, generator=named_generator(seed, name, device))
            self.load_dense(index, draw)

    def factor_pairs(self) -> list[FactorPair]:
        """The factorized matrices of this layer; none for a dense layer."""
        return []

    def extra_repr(self) -> str:
        return (
            f"in={self.shape.in_used}, out={list(self.shape.out_used)}, "
            f"bias={self.bias is not None}"
        )


class DenseLinear(GroupedLinear):
    """``y_i = x W_i^T (+ b_i)`` for the matrices of one group, in one GEMM.

    Parameter ``weight`` is ``(sum m_i, n)``: the matrices W_i stacked by rows. Under tensor
    parallelism n numbers a token are summed going back where W is cut by rows, m going forward
    where it is cut by columns.
    """

    def __init__(self, shape: LinearShape, bias: bool = False) -> None:
        super().__init__(shape, bias)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), shape.local_in))
        set_row_blocks(self.weight, shape.names, shape.row_ranges())
        set_shard(self.weight, shape.shard())

    def forward(self, x: torch.Tensor | DeferredSwiGLU) -> tuple[torch.Tensor, ...]:
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
        """What this rank holds of W_index without padding, float32, ``(m, n)``."""
        return self.weight.detach()[self.used_rows(index), self.used_columns()].float()

    @torch.no_grad()
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W_index to the whole ``weight (m, n)``."""
        part = self.held_part(index, weight)
        self.weight[self.used_rows(index), self.used_columns()] = part.to(self.weight)


class FactorizedLinear(GroupedLinear):
    """Factors A_i (r x n), B_i (m_i x r) of the matrices of one group, and what they share.

    Parameters: ``a (G r, n)`` stacks the G factors A_i, which read the same x and run as one GEMM;
    ``b (sum m_i, r)`` stacks the factors B_i.

    Under tensor parallelism A is cut by columns where the input is cut, B by rows where the outputs
    are, and G r numbers a token are summed: ``x A^T`` going forward in the first case, its gradient
    going back in the second. A factor that is not cut has the same gradient on all ranks.

    Args:
        shape: sizes of the group.
        rank: r, at most min(m, n) of every matrix of the group.
        alpha: numerator of the scale alpha / r.
        bias: adds a dense vector to each output.
    """

    def __init__(self, shape: LinearShape, rank: int, alpha: float, bias: bool = False) -> None:
        super().__init__(shape, bias)
        self.rank = rank
        self.scale = alpha / rank
        stacked = len(shape.names) * rank
        self.a = nn.Parameter(torch.empty(stacked, shape.local_in))
        self.b = nn.Parameter(torch.empty(sum(self.sizes), rank))
        set_row_blocks(self.a, tuple(f"{n}.A" for n in shape.names), self._a_ranges())
        set_row_blocks(self.b, tuple(f"{n}.B" for n in shape.names), shape.row_ranges())
        set_shard(self.a, shape.shard(rows=stacked))
        set_shard(self.b, shape.shard(columns=rank))

    def _a_ranges(self) -> list[tuple[int, int]]:
        return [(i * self.rank, (i + 1) * self.rank) for i in range(len(self.shape.names))]

    def bottleneck(self, x: torch.Tensor | DeferredRMSNorm | DeferredSwiGLU) -> torch.Tensor:
        """``x A_i^T`` of the whole input side by side, ``(..., G r)``, the same on all ranks."""
        if isinstance(x, DeferredRMSNorm):
            h = reduce(F.linear(x.values, self.a), self.input_group)
            return x.scaled(h, self.input_group)
        return reduce(product(x, self.a), self.input_group)

    def low_rank_outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``scale (x A_i^T) B_i^T`` for every matrix, ``(..., m_i)`` each; no bias."""
        h = copy(self.bottleneck(x), self.output_group)
        return tuple(up_project(h, self.b, self.sizes, self.scale, False))

    def outputs_of(self, h: torch.Tensor, together: bool = False) -> tuple[torch.Tensor, ...]:
        """``scale h_i B_i^T (+ bias_i)`` of bottlenecks ``h (..., G r)``, ``(..., m_i)`` each.

        ``forward_stacked``: one tensor ``(G, ..., m)``; of matrices of one size, without biases.
        """
        h = copy(h, self.output_group)
        outputs = up_project(h, self.b, self.sizes, self.scale, together)
        if self.bias is None:
            return tuple(outputs)
        biases = self.bias.split(self.sizes)
        return tuple(y + bias for y, bias in zip(outputs, biases, strict=True))

    def used_factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of what this rank holds of A_index (r, n) and B_index (m, r), without padding."""
        a_start = index * self.rank
        a = self.a.detach()[a_start : a_start + self.rank, self.used_columns()]
        return a, self.b.detach()[self.used_rows(index)]

    @torch.no_grad()
    def load_factors(self, index: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Set the factors from the whole unpadded A (r, n) and B (m, r) of matrix ``index``."""
        mine_a, mine_b = self.used_factors(index)
        mine_a.copy_(a[:, self.shape.held_columns()])
        mine_b.copy_(b[self.shape.held_rows(index)])

    def dense_weight(self, index: int) -> torch.Tensor:
        """What this rank holds of ``scale * B A``, without padding, multiplied in float32.

        Raises:
            ValueError: both factors are cut, so no rank can form a part of their product.
        """
        if self.input_group is not None and self.output_group is not None:
            raise ValueError(f"{self.shape.names[index]}: both factors are cut over ranks")
        a, b = self.used_factors(index)
        return self.scale * (b.float() @ a.float())

    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set the factors to the best rank-r approximation of ``weight (m, n)``, balanced."""
        u, s, vh = torch.linalg.svd(weight.double() / self.scale, full_matrices=False)
        root = s[: self.rank].sqrt()
        self.load_factors(index, root[:, None] * vh[: self.rank], u[:, : self.rank] * root)

    def factor_pairs(self) -> list[FactorPair]:
        """The factor pairs of this group, in order."""
        return [
            FactorPair(name, self.b, b_rows, self.a, a_rows, self.scale, self.shape.spec)
            for name, b_rows, a_rows in zip(
                self.shape.names, self.shape.row_ranges(), self._a_ranges(), strict=True
            )
        ]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


class BottleneckLinear(FactorizedLinear):
    """A layer that is its two factors and nothing else: only r numbers a matrix pass through."""

    def forward(
        self, x: torch.Tensor | DeferredRMSNorm | DeferredSwiGLU
    ) -> tuple[torch.Tensor, ...]:
        return self.outputs_of(self.bottleneck(x))

    def forward_stacked(self, x: Any) -> tuple[torch.Tensor, ...]:
        """``(G, ..., m)`` where the matrices have one size and no biases."""
        if self.bias is not None or len(set(self.sizes)) > 1:
            return super().forward_stacked(x)
        return self.outputs_of(self.bottleneck(x), together=True)


class LowRankLinear(BottleneckLinear):
    """``y_i = (alpha/r) (x A_i^T) B_i^T (+ b_i)``: no full matrix is ever formed.

    METHODS: Low-Rank, arXiv 2505.22922 §3.

    Args:
        shape, rank, alpha, bias: as in FactorizedLinear.
        init: ``kaiming``: A ~ U(+-1/sqrt(n)), B ~ U(+-1/sqrt(r)), the published choice
            (Kaiming uniform, a = sqrt 5), whose W has variance (alpha/r)^2 / (9 n).
            ``full_rank_variance``: normal factors whose W has the variance of the full-rank init
            and whose expected Gram matrices are equal (balanced): m var(B) = n var(A).
            ``xavier``: A ~ N(0, 2 / (r + n)), B ~ N(0, 2 / (m + r)), LORO's choice.
    """

    def __init__(
        self, shape: LinearShape, rank: int, alpha: float, init: str, bias: bool = False
    ) -> None:
        super().__init__(shape, rank, alpha, bias)
        self.init = init

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw the factors from the global sizes as ``init`` says; padding is zero.

        ``std`` is the standard deviation of the full-rank init.
        """
        self.a.zero_()
        self.b.zero_()
        n = self.shape.in_used
        for index, name in enumerate(self.shape.names):
            m = self.shape.out_used[index]
            device = self.a.device
            gen_a = named_generator(seed, f"{name}.A", device)
            gen_b = named_generator(seed, f"{name}.B", device)
            draw_a = torch.empty(self.rank, n, device=device)
            draw_b = torch.empty(m, self.rank, device=device)
            if self.init == "kaiming":
                draw_a.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=gen_a)
                bound = 1 / math.sqrt(self.rank)
                draw_b.uniform_(-bound, bound, generator=gen_b)
            elif self.init == "xavier":
                draw_a.normal_(0.0, math.sqrt(2 / (self.rank + n)), generator=gen_a)
                draw_b.normal_(0.0, math.sqrt(2 / (m + self.rank)), generator=gen_b)
            else:
                product = std / (self.scale * math.sqrt(self.rank))  # std(A) std(B)
                ratio = (m / n) ** 0.25
                draw_a.normal_(0.0, math.sqrt(product) * ratio, generator=gen_a)
                draw_b.normal_(0.0, math.sqrt(product) / ratio, generator=gen_b)
            self.load_factors(index, draw_a, draw_b)
