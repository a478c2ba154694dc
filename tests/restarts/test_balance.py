"""Balanced factors against the definition by the SVD of the materialised product, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalr.layers.latent_residual import LatentResidual
from megalr.restarts.balance import (
    balance_in_place,
    balanced_factors,
    balanced_factors_by_qr,
    imbalance,
)
from megalr.restarts.batched_eigh import eigh
from tests.ranks import run_distributed


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _case(name: str) -> tuple[Tensor, Tensor]:
    """fp32 factors B (m, r), A (r, n)."""
    m, r, n = 40, 8, 24
    if name in ("one", "full"):
        r = 1 if name == "one" else 24
    b, a = _randn(m, r, seed=1), _randn(r, n, seed=2)
    spread = torch.logspace(0, -8, r, dtype=torch.float64)
    if name == "columns of B over 8 orders":
        b = b * spread
    elif name == "opposite scales":
        b, a = b * spread, a * spread.flip(0).unsqueeze(1) * 1e8
    elif name == "same scales":
        b, a = b * spread.sqrt(), a * spread.sqrt().unsqueeze(1)
    elif name == "rows of A over 8 orders":
        a = a * spread.unsqueeze(1)
    elif name == "trained":  # decaying spectrum, correlated columns
        b = b @ _randn(r, r, seed=3) * torch.logspace(0, -3, r, dtype=torch.float64)
    elif name == "huge":
        b, a = b * 1e15, a * 1e-9
    elif name == "nearly dependent columns":
        b[:, 1] = b[:, 0] + 1e-6 * b[:, 1]
    elif name == "deficient B":
        b[:, 5] = b[:, 2]
        b[:, 3] = 0
    elif name == "deficient A":
        a[4] = 2 * a[1] - a[0]
        a[6] = 0
    elif name == "deficient both":
        b[:, 5] = b[:, 2]
        a[6] = a[7]
    elif name == "rank above rows":
        b = b[:5]
    elif name == "rank above columns":
        a = a[:, :6]
    return b.float(), a.float()


FULL_RANK = [
    "random",
    "one",
    "full",
    "columns of B over 8 orders",
    "rows of A over 8 orders",
    "opposite scales",
    "same scales",
    "trained",
    "huge",
    "nearly dependent columns",
]
DEFICIENT = [
    "deficient B",
    "deficient A",
    "deficient both",
    "rank above rows",
    "rank above columns",
]


def _errors(b: Tensor, a: Tensor, new_b: Tensor, new_a: Tensor) -> tuple[float, float]:
    """Relative change of the product and relative violation of the balance."""
    b, a, new_b, new_a = (x.double() for x in (b, a, new_b, new_a))
    product = b @ a
    sigma = torch.linalg.svdvals(product)
    change = (new_b @ new_a - product).norm() / product.norm()
    balance = (new_b.mT @ new_b - new_a @ new_a.mT).norm() / sigma.norm()
    return float(change), float(balance)


@pytest.mark.parametrize("method", [balanced_factors, balanced_factors_by_qr])
@pytest.mark.parametrize("name", FULL_RANK + DEFICIENT)
def test_product_kept_and_balanced_to_1e_minus_7_from_and_to_fp32(name: str, method) -> None:
    b, a = _case(name)
    result = method(b, a)
    assert result.b.dtype == torch.float32 and result.a.dtype == torch.float32
    change, balance = _errors(b, a, result.b, result.a)
    assert change <= 1e-7
    assert balance <= 1e-7


@pytest.mark.parametrize("method", [balanced_factors, balanced_factors_by_qr])
@pytest.mark.parametrize("name", FULL_RANK + DEFICIENT)
def test_equals_the_svd_definition_up_to_sign(name: str, method) -> None:
    b, a = (x.double() for x in _case(name))
    result = method(b, a)
    u, sigma, vt = torch.linalg.svd(b @ a, full_matrices=False)
    k = min(b.shape[1], len(sigma))
    live = sigma[:k] > 1e-12 * sigma[0]
    torch.testing.assert_close(
        result.singular_values[:k] * live, sigma[:k] * live, rtol=1e-6, atol=1e-12 * float(sigma[0])
    )
    signs = (result.b[:, :k] * u[:, :k]).sum(0).sign()
    root = sigma[:k].sqrt()
    scale = float(root[0])
    expected_b, expected_a = u[:, :k] * (root * signs), (vt[:k].mT * (root * signs)).mT
    # A singular vector is determined to rounding / gap to its neighbours; where neighbours are
    # closer than the error of the small ones only the whole is compared (the product, above).
    well = live & (sigma[:k] > 1e-6 * sigma[0])
    assert (result.b[:, :k] - expected_b)[:, well].abs().max() <= 1e-7 * scale
    assert (result.a[:k] - expected_a)[well].abs().max() <= 1e-7 * scale
    columns = torch.linalg.vector_norm(result.b[:, :k], dim=0)[live]
    torch.testing.assert_close(columns, root[live], rtol=1e-5, atol=1e-9 * scale)


def test_both_paths_agree_including_signs_and_repeat_themselves() -> None:
    b, a = _case("trained")
    b, a = b.double(), a.double()
    gram, qr = balanced_factors(b, a), balanced_factors_by_qr(b, a)
    assert not gram.by_qr and qr.by_qr
    torch.testing.assert_close(gram.b, qr.b, rtol=0, atol=1e-7)
    torch.testing.assert_close(gram.a, qr.a, rtol=0, atol=1e-7)
    again = balanced_factors(b, a)
    assert torch.equal(gram.b, again.b) and torch.equal(gram.a, again.a)


def test_balanced_factors_come_back_unchanged_with_their_signs() -> None:
    first = balanced_factors(*(x.double() for x in _case("trained")))
    second = balanced_factors(first.b, first.a)
    torch.testing.assert_close(second.b, first.b, rtol=0, atol=1e-9)
    torch.testing.assert_close(second.a, first.a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FULL_RANK + DEFICIENT)
def test_the_path_is_chosen_by_conditioning_and_nothing_raises(name: str) -> None:
    easy = name in ("random", "one", "full", "trained", "huge", "opposite scales")
    assert balanced_factors(*_case(name)).by_qr is not easy


@pytest.mark.parametrize("name", DEFICIENT)
def test_dead_directions_are_counted_and_gradients_reach_every_direction_again(name: str) -> None:
    b, a = _case(name)
    result = balanced_factors(b, a)
    true_rank = int(torch.linalg.matrix_rank(b.double() @ a.double()))
    assert result.dead == b.shape[1] - true_rank
    new_b, new_a = result.b.requires_grad_(), result.a.requires_grad_()
    x = _randn(16, a.shape[1], seed=5).float()
    target = _randn(16, b.shape[0], seed=6).float()
    (((x @ new_a.T) @ new_b.T - target) ** 2).sum().backward()
    reached = (new_b.grad.abs().amax(0) > 0) | (new_a.grad.abs().amax(1) > 0)
    assert reached.all()
    assert result.reseeded == result.dead
    seeds = new_a.detach()[b.shape[1] - result.dead :]
    if name != "rank above columns":
        assert (seeds.norm(dim=1) > 0).all()
        assert (seeds @ new_a.detach()[: b.shape[1] - result.dead].T).abs().max() < 1e-6


def test_a_zero_product_is_left_alone_when_one_factor_lives_and_seeded_when_none_does() -> None:
    b, a = _case("random")
    zero_b, zero_a = torch.zeros_like(b), torch.zeros_like(a)
    for left, right in ((zero_b, a), (b, zero_a)):
        result = balanced_factors(left, right)
        assert torch.equal(result.b, left) and torch.equal(result.a, right)
        assert (result.dead, result.reseeded) == (8, 0)
    result = balanced_factors(zero_b, zero_a)
    assert torch.equal(result.b, zero_b) and (result.dead, result.reseeded) == (8, 8)
    torch.testing.assert_close(result.a @ result.a.T, torch.eye(8) / 3)
    # Both factors alive, product zero: B acts where A has nothing.
    b[:, 4:] = 0
    a[:4] = 0
    result = balanced_factors(b, a)
    assert torch.equal(result.b, b) and torch.equal(result.a, a)


@pytest.mark.parametrize("name", ["random", "deficient B", "columns of B over 8 orders"])
def test_zero_rows_of_b_and_zero_columns_of_a_stay_exactly_zero(name: str) -> None:
    b, a = _case(name)
    b[-3:] = 0
    a[:, -5:] = 0
    result = balanced_factors(b, a)
    assert torch.count_nonzero(result.b[-3:]) == 0 and torch.count_nonzero(result.a[:, -5:]) == 0
    assert max(_errors(b, a, result.b, result.a)) <= 1e-7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_refused(bad: float) -> None:
    b, a = _case("random")
    b[3, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        balanced_factors(b, a)


def test_in_place_over_many_matrices_equals_one_by_one_for_any_batch() -> None:
    names = ["random", "trained", "deficient B", "one", "full", "huge"]
    expected = [balanced_factors(*_case(name)) for name in names]
    for workspace in (1, 2 * 80 * 64, 1 << 24):
        pairs = [_case(name) for name in names]
        before = [(b.clone(), a.clone()) for b, a in pairs]
        found = balance_in_place(pairs, workspace_bytes=workspace)
        assert [(one.by_qr, one.dead, one.reseeded) for one in found] == [
            (result.by_qr, result.dead, result.reseeded) for result in expected
        ]
        assert [one.dead for one in found] == [0, 0, 2, 0, 0, 0]
        for one, (old_b, old_a) in zip(found, before, strict=True):
            old_b, old_a = old_b.double(), old_a.double()
            true = torch.linalg.svdvals(old_b @ old_a)[: old_b.shape[1]]
            torch.testing.assert_close(
                one.singular_values, true, rtol=1e-7, atol=1e-9 * float(true[0])
            )
            torch.testing.assert_close(
                one.imbalance, imbalance(old_b.mT @ old_b, old_a @ old_a.mT), rtol=1e-9, atol=0
            )
        for (b, a), result in zip(pairs, expected, strict=True):
            torch.testing.assert_close(b, result.b, rtol=0, atol=1e-7 * float(b.abs().max()))
            torch.testing.assert_close(a, result.a, rtol=0, atol=1e-7 * float(a.abs().max()))


def test_imbalance_is_zero_when_balanced_and_grows_to_one() -> None:
    b, a = (x.double() for x in _case("random"))
    result = balanced_factors(b, a)
    grams = [(x.b.mT @ x.b, x.a @ x.a.mT) for x in (result,)]
    assert float(imbalance(*grams[0])) < 1e-12
    assert float(imbalance(b.mT @ b * 1e12, a @ a.mT)) > 0.999
    assert float(imbalance(torch.zeros(8, 8), torch.zeros(8, 8))) == 0.0


def _cut(name: str, cut_b: bool, cut_a: bool) -> tuple:
    import torch.distributed as dist

    group = dist.group.WORLD
    world, rank = dist.get_world_size(), dist.get_rank()
    b, a = _case(name)
    # Uneven cuts: the last rank holds what is left, here fewer rows than the rank.
    rows = [min(i * 18, b.shape[0]) for i in range(world)] + [b.shape[0]]
    columns = [min(i * 11, a.shape[1]) for i in range(world)] + [a.shape[1]]
    result = balanced_factors(
        b[rows[rank] : rows[rank + 1]] if cut_b else b,
        a[:, columns[rank] : columns[rank + 1]] if cut_a else a,
        b_group=group if cut_b else None,
        a_group=group if cut_a else None,
    )
    return result.b, result.a, result.by_qr, result.dead, result.reseeded


@pytest.mark.parametrize("world_size", [2, 3])
def test_cut_factors_give_what_whole_factors_give(world_size: int) -> None:
    for name in ("trained", "columns of B over 8 orders", "deficient B", "deficient A"):
        b, a = _case(name)
        whole = balanced_factors(b, a)
        for cut_b, cut_a in ((True, False), (False, True), (True, True)):
            parts = run_distributed(_cut, world_size, name, cut_b, cut_a)
            assert all(p[2:] == (whole.by_qr, whole.dead, whole.reseeded) for p in parts)
            if not cut_b:
                assert all(torch.equal(p[0], parts[0][0]) for p in parts)
            if not cut_a:
                assert all(torch.equal(p[1], parts[0][1]) for p in parts)
            new_b = torch.cat([p[0] for p in parts]) if cut_b else parts[0][0]
            new_a = torch.cat([p[1] for p in parts], dim=1) if cut_a else parts[0][1]
            assert max(_errors(b, a, new_b, new_a)) <= 1e-7
            live = slice(0, b.shape[1] - whole.dead)
            scale = float(whole.b.abs().max())
            torch.testing.assert_close(new_b[:, live], whole.b[:, live], rtol=0, atol=1e-6 * scale)
            torch.testing.assert_close(new_a[live], whole.a[live], rtol=0, atol=1e-6 * scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_restarts_reserve_no_more_memory_than_the_first_ones() -> None:
    """The allocator gives nothing of one stream's memory to another."""
    matrices = torch.randn(8, 64, 64, device="cuda", dtype=torch.float64)
    matrices = matrices + matrices.mT
    reserved = []
    for _ in range(4):
        eigh(matrices)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[3] == reserved[1]


@pytest.mark.parametrize("name", ["trained", "deficient both", "columns of B over 8 orders"])
def test_a_fixed_offset_stays_where_it_is_and_the_sum_is_balanced(name: str) -> None:
    """B' + E and A' are what the sum alone gives, by both paths, in float64."""
    b, a = (factor.double() for factor in _case(name))
    residual = LatentResidual.of(len(b) - 3, b.shape[1], 2.0, slice(0, len(b) - 3))
    b[-3:] = 0  # padding
    alone = (residual.add_to(b.clone()), a.clone())
    product = alone[0] @ a
    (expected,) = balance_in_place([alone], workspace_bytes=1 << 20)
    pair = (b.clone(), a.clone())
    (found,) = balance_in_place([pair], workspace_bytes=1 << 20, residuals=[residual])
    whole = residual.add_to(pair[0].clone())
    assert float((whole @ pair[1] - product).norm()) < 1e-10 * float(product.norm())
    torch.testing.assert_close(whole, alone[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pair[1], alone[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.singular_values, expected.singular_values)
    assert (found.by_qr, found.dead) == (expected.by_qr, expected.dead)
    assert not pair[0][-3:].any()
