"""Low-rank pretraining: each matrix is a product (arXiv 2505.22922; docs/methods/factorized.md)."""

from __future__ import annotations

import math

import torch

from megalr.layers.factors import LinearShape, named_generator
from megalr.layers.linear import BottleneckLinear


class LowRankLinear(BottleneckLinear):
    """``y_i = (alpha/r) (x A_i^T) B_i^T (+ b_i)``, without ever computing a full matrix.

    Low-rank pretraining, arXiv 2505.22922 §3 (docs/methods/factorized.md).

    Args:
        shape, rank, alpha, bias, dlr_alpha: as in FactorizedLinear.
        init: ``kaiming``: A ~ U(+-1/sqrt(n)), B ~ U(+-1/sqrt(r)), the published choice
            (Kaiming uniform, a = sqrt 5), whose W has variance (alpha/r)^2 / (9 n).
            ``full_rank_variance``: normal factors whose W has the variance of the full-rank init
            and whose expected Gram matrices are equal (balanced): m var(B) = n var(A).
            ``orthogonal``: orthonormal columns of B and rows of A (QR of normal draws), Spectron's.
            ``xavier``: A ~ N(0, 2 / (r + n)), B ~ N(0, 2 / (m + r)), LORO's choice.
            ``normal``: both ~ N(0, sigma^2), sigma = r^(-1/4) (m + n)^(-1/4), CoLA's and DLR's.
    """

    def __init__(
        self,
        shape: LinearShape,
        rank: int,
        alpha: float,
        init: str,
        bias: bool = False,
        dlr_alpha: float | None = None,
    ) -> None:
        super().__init__(shape, rank, alpha, bias, dlr_alpha)
        self.init = init

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw the factors for the whole sizes by ``init``; padding is zero.

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
            elif self.init == "orthogonal":
                draw_a = torch.linalg.qr(draw_a.normal_(generator=gen_a).mT).Q.mT
                draw_b = torch.linalg.qr(draw_b.normal_(generator=gen_b)).Q
            elif self.init == "xavier":
                draw_a.normal_(0.0, math.sqrt(2 / (self.rank + n)), generator=gen_a)
                draw_b.normal_(0.0, math.sqrt(2 / (m + self.rank)), generator=gen_b)
            elif self.init == "normal":
                sigma = (self.rank * (m + n)) ** -0.25
                draw_a.normal_(0.0, sigma, generator=gen_a)
                draw_b.normal_(0.0, sigma, generator=gen_b)
            else:
                spread = std / (self.scale * math.sqrt(self.rank))  # std(A) std(B)
                ratio = (m / n) ** 0.25
                draw_a.normal_(0.0, math.sqrt(spread) * ratio, generator=gen_a)
                draw_b.normal_(0.0, math.sqrt(spread) / ratio, generator=gen_b)
            self.load_factors(index, draw_a, draw_b)
            del draw_a, draw_b  # before the next ones are allocated
