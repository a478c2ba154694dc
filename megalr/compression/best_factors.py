"""The best factors of a matrix: in itself, or for the inputs that it sees.

For a weight W (m, n) and a rank r the factors B (m, r), A (r, n) minimize

    |W - B A|_F             without statistics: the truncated SVD (Eckart and Young 1936);
    E |W x - B A x|^2       for inputs x with second moment C = E[x x^T]  (n, n).

The second is |(W - B A) R|_F^2 for any R with R R^T = C. By the same theorem B A R is the truncated
SVD of W R = U S V^T, that is U_r U_r^T W R. So B = U_r and A = U_r^T W are optimal: R is never
inverted, and C may be singular. Published as data-aware low rank: DRONE (Chen et al., NeurIPS
2021), SVD-LLM (arXiv 2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalr.errors import UserError

DAMPING = 1e-6
"""Share of the mean of C's diagonal that is added to it. Directions that no calibration token has
then count a little, so factors of full rank are W itself."""


@dataclass(frozen=True)
class Factors:
    """Balanced factors, ``B^T B = A A^T``, of one matrix.

    Attributes:
        b: (m, r) float64.
        a: (r, n) float64.
        error: ``|(W - B A) R| / |W R|`` (Frobenius), R = I without statistics.
    """

    b: torch.Tensor
    a: torch.Tensor
    error: float


def root_of(moment: torch.Tensor) -> torch.Tensor:
    """Symmetric R (n, n) float64 with ``R R = C + DAMPING mean(diag C) I``.

    ``moment``: C (n, n), symmetric; eigenvalues below zero, which rounding may give it, are taken
    as zero. For C = 0 (an input that was never active) R is I.
    """
    c = moment.double()
    scale = c.diagonal().mean()
    if not bool(scale > 0):
        return torch.eye(len(c), dtype=torch.float64, device=c.device)
    values, vectors = torch.linalg.eigh((c + c.mT) / (2 * scale))
    return (vectors * (values.clamp(min=0) + DAMPING).sqrt()) @ vectors.mT * scale.sqrt()


def best_factors(
    name: str, weight: torch.Tensor, rank: int, root: torch.Tensor | None = None
) -> Factors:
    """The minimizer B A of ``|(W - B A) R|_F``, balanced; all in float64.

    Args:
        name: of the matrix, for errors.
        weight: W (m, n).
        rank: r, from 1 to min(m, n).
        root: R (n, n) of :func:`root_of`; None: the identity.

    Raises:
        UserError: the decomposition does not converge.
    """
    w = weight.double()
    try:
        u, s, vh = torch.linalg.svd(w if root is None else w @ root, full_matrices=False)
        error = _share_beyond(s, rank)
        u = u[:, :rank]  # (m, r)
        if root is not None:  # the SVD of the product U_r (U_r^T W)
            turn, s, vh = torch.linalg.svd(u.mT @ w, full_matrices=False)
            u = u @ turn
    except torch.linalg.LinAlgError as failure:
        raise UserError(f"the SVD of {name} failed ({failure})") from failure
    half = s[:rank].sqrt()
    return Factors(u * half, half[:, None] * vh[:rank], error)


def _share_beyond(singular_values: torch.Tensor, rank: int) -> float:
    """Norm of the singular values beyond the first ``rank``, relative to that of all."""
    size = float(torch.linalg.vector_norm(singular_values))
    return float(torch.linalg.vector_norm(singular_values[rank:])) / size if size > 0 else 0.0
