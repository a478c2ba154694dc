"""Linear layers of the decoder: dense (full_rank) and factorized (low_rank), grouped by input.

Every layer maps ``x (..., n)`` to a tuple with one output per logical matrix and offers the same
interface: ``reset_parameters``, ``dense_weight``, ``load_dense`` and ``factor_pairs``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from megalr.layers.factors import FactorPair, LinearShape, named_generator, set_row_blocks


class GroupedLinear(nn.Module, ABC):
    """The matrices of one group: ``x (..., n)`` to one output ``(..., m_i)`` for each.

    What the kinds of layers share; ``bias`` is the stack ``(sum m_i,)`` of the biases, or None.
    """

    def __init__(self, shape: LinearShape, bias: bool) -> None:
        super().__init__()
        self.shape = shape
        # Plain sizes for forward: a compiled forward that read names would not be shared by blocks.
        self.sizes = shape.out_features
        self.bias = nn.Parameter(torch.zeros(sum(shape.out_features))) if bias else None

    @abstractmethod
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw the weights from ``seed`` and the matrices' names; padding is zero."""

    @abstractmethod
    def dense_weight(self, index: int) -> torch.Tensor:
        """The matrix W_index without padding, float32, ``(m, n)``."""

    @abstractmethod
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W_index to ``weight (m, n)``, or as near as the layer can come."""

    def used_rows(self, index: int) -> slice:
        """Rows of matrix ``index`` in the stack, without padding."""
        start, _ = self.shape.row_ranges()[index]
        return slice(start, start + self.shape.out_used[index])

    def factor_pairs(self) -> list[FactorPair]:
        """The factorized matrices of this layer; none for a dense layer."""
        return []

    def extra_repr(self) -> str:
        return (
            f"in={self.shape.in_used}, out={list(self.shape.out_used)}, "
            f"bias={self.bias is not None}"
        )


class FullRankLinear(GroupedLinear):
    """``y_i = x W_i^T (+ b_i)`` for the matrices of one group, in one GEMM.

    Parameter ``weight`` is ``(sum m_i, n)``: the matrices W_i stacked by rows.
    """

    def __init__(self, shape: LinearShape, bias: bool = False) -> None:
        super().__init__(shape, bias)
        self.weight = nn.Parameter(torch.empty(sum(shape.out_features), shape.in_features))
        set_row_blocks(self.weight, shape.names, shape.row_ranges())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.linear(x, self.weight, self.bias)  # (..., sum m_i)
        return y.split(self.sizes, dim=-1)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw every W_i from N(0, std^2); padding is zero."""
        self.weight.zero_()
        for index, name in enumerate(self.shape.names):
            used = self.weight[self.used_rows(index), : self.shape.in_used]
            # Drawn without padding, so the numbers do not depend on pad_multiple.
            draw = torch.empty(used.shape, device=used.device)
            used.copy_(draw.normal_(0.0, std, generator=named_generator(seed, name, used.device)))

    def dense_weight(self, index: int) -> torch.Tensor:
        """W_index without padding, float32, ``(m, n)``."""
        return self.weight.detach()[self.used_rows(index), : self.shape.in_used].float()

    @torch.no_grad()
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W_index to ``weight (m, n)``."""
        self.weight[self.used_rows(index), : self.shape.in_used] = weight.to(self.weight)


class FactorizedLinear(GroupedLinear):
    """Factors A_i (r x n), B_i (m_i x r) of the matrices of one group, and what they share.

    Parameters: ``a (G r, n)`` stacks the G factors A_i, which read the same x and run as one GEMM;
    ``b (sum m_i, r)`` stacks the factors B_i.

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
        self.a = nn.Parameter(torch.empty(len(shape.names) * rank, shape.in_features))
        self.b = nn.Parameter(torch.empty(sum(shape.out_features), rank))
        set_row_blocks(self.a, tuple(f"{n}.A" for n in shape.names), self._a_ranges())
        set_row_blocks(self.b, tuple(f"{n}.B" for n in shape.names), shape.row_ranges())

    def _a_ranges(self) -> list[tuple[int, int]]:
        return [(i * self.rank, (i + 1) * self.rank) for i in range(len(self.shape.names))]

    def low_rank_outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``scale (x A_i^T) B_i^T`` for every matrix, ``(..., m_i)`` each; no bias."""
        return self._expand(F.linear(x, self.a), (None,) * len(self.sizes))

    def outputs_of(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``scale h_i B_i^T (+ bias_i)`` of bottlenecks ``h (..., G r)``, ``(..., m_i)`` each."""
        if self.bias is None:
            return self._expand(h, (None,) * len(self.sizes))
        return self._expand(h, self.bias.split(self.sizes))

    def _expand(
        self, h: torch.Tensor, biases: tuple[torch.Tensor | None, ...]
    ) -> tuple[torch.Tensor, ...]:
        # The scale goes to B: m x r products instead of one a token.
        b = self.b if self.scale == 1.0 else self.b * self.scale
        parts = zip(
            h.split(self.rank, dim=-1),  # (..., r) each
            b.split(self.sizes),  # (m_i, r) each
            biases,
            strict=True,
        )
        return tuple(F.linear(h_i, b_i, bias) for h_i, b_i, bias in parts)  # (..., m_i) each

    def used_factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of A_index (r, n) and B_index (m, r) without padding."""
        a_start = index * self.rank
        a = self.a.detach()[a_start : a_start + self.rank, : self.shape.in_used]
        return a, self.b.detach()[self.used_rows(index)]

    def dense_weight(self, index: int) -> torch.Tensor:
        """``scale * B A`` of one matrix without padding, multiplied in float32, ``(m, n)``."""
        a, b = self.used_factors(index)
        return self.scale * (b.float() @ a.float())

    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set the factors to the best rank-r approximation of ``weight (m, n)``, balanced."""
        u, s, vh = torch.linalg.svd(weight.double() / self.scale, full_matrices=False)
        root = s[: self.rank].sqrt()
        a, b = self.used_factors(index)
        a.copy_(root[:, None] * vh[: self.rank])
        b.copy_(u[:, : self.rank] * root)

    def factor_pairs(self) -> list[FactorPair]:
        """The factor pairs of this group, in order."""
        return [
            FactorPair(name, self.b, b_rows, self.a, a_rows, self.scale)
            for name, b_rows, a_rows in zip(
                self.shape.names, self.shape.row_ranges(), self._a_ranges(), strict=True
            )
        ]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


class LowRankLinear(FactorizedLinear):
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

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.outputs_of(F.linear(x, self.a))

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
            a, b = self.used_factors(index)
            gen_a = named_generator(seed, f"{name}.A", a.device)
            gen_b = named_generator(seed, f"{name}.B", b.device)
            draw_a = torch.empty(self.rank, n, device=a.device)
            draw_b = torch.empty(m, self.rank, device=b.device)
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
            a.copy_(draw_a)
            b.copy_(draw_b)
