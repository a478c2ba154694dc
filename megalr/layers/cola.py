"""CoLA: a nonlinearity between the factors (arXiv 2502.10940; docs/methods/factorized.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalr.errors import UserError
from megalr.layers.factors import FactorPair, LinearShape, named_generator
from megalr.layers.linear import BottleneckLinear


class CoLALinear(BottleneckLinear):
    """``y_i = silu(x A_i^T) (B_i + E_i)^T (+ bias_i)``: an auto-encoder in place of each matrix.

    Both factors ~ N(0, sigma^2) with ``sigma = r^(-1/4) (n + m)^(-1/4)``; no scale. No matrix W has
    this function, so there is nothing to refactorize, no dense weight and no dense export.

    Args:
        shape, rank, bias, dlr_alpha: as in FactorizedLinear.
    """

    form = "silu"

    def __init__(
        self,
        shape: LinearShape,
        rank: int,
        bias: bool = False,
        dlr_alpha: float | None = None,
    ) -> None:
        super().__init__(shape, rank, float(rank), bias, dlr_alpha)  # scale 1

    def outputs_from(self, h: torch.Tensor, stacked: bool = False) -> tuple[torch.Tensor, ...]:
        """``silu(h_i) B_i^T (+ bias_i)`` for bottlenecks ``h (..., G r)``, ``(..., m_i)`` each."""
        return super().outputs_from(F.silu(h), stacked)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw both factors; padding is zero (silu(0) = 0 keeps it so)."""
        self.a.zero_()
        self.b.zero_()
        for index, name in enumerate(self.shape.names):
            m, n, r, device = (
                self.shape.out_used[index],
                self.shape.in_used,
                self.rank,
                self.a.device,
            )
            sigma = (r * (n + m)) ** -0.25
            a, b = torch.empty(r, n, device=device), torch.empty(m, r, device=device)
            a.normal_(0.0, sigma, generator=named_generator(seed, f"{name}.A", device))
            b.normal_(0.0, sigma, generator=named_generator(seed, f"{name}.B", device))
            self.load_factors(index, a, b)
            del a, b  # before the next ones are allocated

    def factor_pairs(self) -> list[FactorPair]:
        """None: the product of the factors is not the function of the layer."""
        return []

    def dense_weight(self, index: int) -> torch.Tensor:
        """Raises UserError: there is none."""
        raise UserError(
            f"{self.shape.names[index]} is a CoLA layer, whose function is not a matrix: it has no "
            "dense weight"
        )

    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Raises UserError: a matrix cannot be turned into this layer."""
        raise UserError(
            f"{self.shape.names[index]} is a CoLA layer, which cannot take the weights of a matrix"
        )
