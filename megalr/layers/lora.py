"""LoRA for pretraining: a frozen dense matrix, trained factors (arXiv 2106.09685, 2307.05695)."""

from __future__ import annotations

import math

import torch
from torch import nn

from megalr.layers.factors import LinearShape, named_generator, set_row_blocks
from megalr.layers.linear import FactorizedLinear
from megalr.sharding.tensor_shard import set_shard


class LoRALinear(FactorizedLinear):
    """``y_i = x (W0_i + (alpha/r) B_i A_i)^T (+ bias_i)``; W0 is frozen, A and B train.

    Init: W0 ~ N(0, std^2) as in the full-rank model, A ~ U(+-1/sqrt(n)), B = 0. (Published code
    zeroes A as well, so that the gradients of both factors are always zero.)

    Parameters: ``weight (sum m_i, n)`` without gradient, ``a (G r, n)``, ``b (sum m_i, r)``.
    Under tensor parallelism W0 needs the sums of a dense matrix, besides those of the factors.

    Args:
        shape, rank, alpha, bias: as in FactorizedLinear.
    """

    form = "base"

    def __init__(self, shape: LinearShape, rank: int, alpha: float, bias: bool = False) -> None:
        super().__init__(shape, rank, alpha, bias)
        self.weight = nn.Parameter(
            torch.empty(sum(self.sizes), shape.local_in), requires_grad=False
        )
        set_row_blocks(self.weight, shape.names, shape.row_ranges())
        set_shard(self.weight, shape.shard())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x (..., n)`` to the outputs ``(..., m_i)``."""
        frozen = self.dense_output(x, self.weight).split(self.sizes, dim=-1)
        parts = zip(frozen, self.low_rank_outputs(x), strict=True)
        return tuple(y + z for y, z in parts)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw W0 and A, zero B and the padding."""
        self.weight.zero_()
        self.draw_dense(seed, std, self.weight.device)
        self.a.copy_(self.draw_a(seed))
        self.b.zero_()

    @torch.no_grad()
    def draw_a(self, seed: int, draw: str = "") -> torch.Tensor:
        """This rank's shard of ``(G r, n)``, float32: A_i ~ U(+-1/sqrt(n)), padding 0.

        ``draw`` names a draw other than the first.
        """
        values = torch.zeros(self.a.shape, device=self.a.device)
        n = self.shape.in_used
        for index, name in enumerate(self.shape.names):
            generator = named_generator(seed, f"{name}.A{draw}", values.device)
            rows = torch.empty(self.rank, n, device=values.device)
            rows.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)
            local = values[index * self.rank : (index + 1) * self.rank, self.used_columns()]
            local.copy_(rows[:, self.shape.local_columns()])
            del rows  # before the next ones are allocated
        return values

    @torch.no_grad()
    def merge_(self) -> None:
        """``W0 <- W0 + (alpha/r) B A``, multiplied and added in float32, rounded once."""
        for index in range(len(self.sizes)):
            used = self.weight[self.used_rows(index), self.used_columns()]
            used.copy_(self.dense_weight(index))

    def dense_weight(self, index: int) -> torch.Tensor:
        """This rank's shard of ``W0 + scale * B A``, without padding, float32."""
        frozen = self.weight.detach()[self.used_rows(index), self.used_columns()].float()
        return frozen + super().dense_weight(index)

    def stored_matrix(self, index: int) -> dict[str, torch.Tensor]:
        """The factors, and ``base (m, n)``: W0."""
        frozen = self.weight.detach()[self.used_rows(index), self.used_columns()].float()
        return {**super().stored_matrix(index), "base": frozen}

    @torch.no_grad()
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set W0 to ``weight`` and B to zero."""
        part = self.local_part(index, weight)
        self.weight[self.used_rows(index), self.used_columns()].copy_(part)
        _, b = self.used_factors(index)
        b.zero_()

    def weight_count(self) -> int:
        """The frozen matrices and the factors."""
        return super().weight_count() + self.frozen_weight_count()

    def frozen_weight_count(self) -> int:
        """n m_i for each matrix W0_i."""
        return sum(self.shape.in_used * m for m in self.shape.out_used)
