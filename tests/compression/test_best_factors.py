"""The factors against other ways to the same optimum, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalr.compression.best_factors import DAMPING, best_factors, root_of


def correlated(n: int, seed: int = 0, condition: float = 1e4) -> torch.Tensor:
    """A second moment (n, n) whose eigenvalues fall by ``condition``, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (basis * torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)) @ basis.mT


def matrix(m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def weighted_error(w: torch.Tensor, product: torch.Tensor, moment: torch.Tensor) -> float:
    """``tr((W - P) C (W - P)^T)``."""
    rest = w - product
    return float(((rest @ moment) * rest).sum())


SHAPES = pytest.mark.parametrize("m, n", [(12, 20), (20, 12), (16, 16)])


@SHAPES
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_optimum_is_that_of_whitening_with_the_inverse_of_a_cholesky_factor(
    m: int, n: int, rank: int
) -> None:
    w, moment = matrix(m, n), correlated(n)
    found = best_factors("w", w, rank, root_of(moment))
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    lower = np.linalg.cholesky(damped.numpy())
    u, s, vh = np.linalg.svd(w.numpy() @ lower, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ np.linalg.solve(lower.T, vh[:rank].T).T
    torch.testing.assert_close(found.b @ found.a, torch.from_numpy(expected), atol=1e-9, rtol=1e-9)
    left = np.linalg.eigvalsh((w @ damped @ w.mT).numpy())[: m - rank].clip(0).sum()
    error = weighted_error(w, found.b @ found.a, damped)
    assert error == pytest.approx(left, rel=1e-9)
    assert found.error**2 == pytest.approx(left / weighted_error(w, 0 * w, damped), rel=1e-9)


@SHAPES
def test_it_beats_the_plain_svd_for_correlated_inputs_and_is_it_for_white_ones(
    m: int, n: int
) -> None:
    w, moment = matrix(m, n), correlated(n)
    plain = best_factors("w", w, 6)
    u, s, vh = np.linalg.svd(w.numpy(), full_matrices=False)
    torch.testing.assert_close(plain.b @ plain.a, torch.from_numpy((u[:, :6] * s[:6]) @ vh[:6]))
    aware = best_factors("w", w, 6, root_of(moment))
    errors = [weighted_error(w, each.b @ each.a, moment) for each in (aware, plain)]
    assert errors[0] < 0.6 * errors[1]
    white = best_factors("w", w, 6, root_of(7.0 * torch.eye(n)))
    torch.testing.assert_close(white.b @ white.a, plain.b @ plain.a)
    assert white.error == pytest.approx(plain.error)


@SHAPES
def test_factors_are_balanced_and_whole_at_full_rank(m: int, n: int) -> None:
    w = matrix(m, n)
    few = matrix(3, n)  # second moment of three inputs: singular
    for root in (None, root_of(correlated(n)), root_of(few.mT @ few), root_of(torch.zeros(n, n))):
        found = best_factors("w", w, min(m, n), root)
        torch.testing.assert_close(found.b @ found.a, w, atol=1e-9, rtol=1e-9)
        assert found.error == 0
        part = best_factors("w", w, 4, root)
        torch.testing.assert_close(part.b.mT @ part.b, part.a @ part.a.mT, atol=1e-9, rtol=1e-9)


def test_inputs_that_fill_few_directions_are_kept_exactly() -> None:
    w, few = matrix(12, 20), matrix(3, 20)
    found = best_factors("w", w, 3, root_of(few.mT @ few))
    torch.testing.assert_close(found.b @ found.a @ few.mT, w @ few.mT, atol=1e-3, rtol=1e-3)


def test_a_zero_matrix_has_no_error() -> None:
    found = best_factors("w", torch.zeros(4, 6), 2, root_of(correlated(6)))
    assert found.error == 0 and not (found.b @ found.a).any()
