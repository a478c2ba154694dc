"""Carried moments against float64: autograd at the new factors, and the formula entry by entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalr.config.restarts import RestartsConfig
from megalr.engine.state import EngineState
from megalr.errors import UserError
from megalr.restarts.balance import balanced_factors, balanced_factors_by_qr
from megalr.restarts.controller import Restarts
from megalr.restarts.rounds import FactorRounds
from megalr.restarts.transport import AdamBias, MomentTransport, carry_moments, check_transport
from tests.ranks import RankFailed, run_distributed
from tests.restarts.engines import KINDS, engine_of, on_ranks, train
from tests.restarts.test_balance import _case
from tests.training.runs import events, losses, run, settings, zero
from tests.training.test_methods import METHODS
from tests.training.test_resume import _cut_back

BETAS = (0.9, 0.99)
HEALTHY = ("trained", "opposite scales", "one")
DEFICIENT = ("deficient B", "deficient A", "deficient both", "rank above rows")


def _gradients(b: Tensor, a: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Those of a loss of B A, by autograd in float64; the loss is another for every seed."""
    generator = torch.Generator().manual_seed(seed)
    m, n = b.shape[0], a.shape[1]
    x = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(m, 12, generator=generator, dtype=torch.float64)
    b, a = b.double().requires_grad_(), a.double().requires_grad_()
    ((b @ a @ x - y) ** 2).sum().backward()
    return b.grad, a.grad


def _averages(b: Tensor, a: Tensor, updates: int) -> list[tuple[Tensor, Tensor]]:
    """m and v of B and of A after updates by Adam's averages, at factors that stay."""
    moments = [[torch.zeros_like(x, dtype=torch.float64) for _ in range(2)] for x in (b, a)]
    for seed in range(updates):
        for (m, v), g in zip(moments, _gradients(b, a, seed), strict=True):
            m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    return [(m, v) for m, v in moments]


@pytest.mark.parametrize("balance", [balanced_factors, balanced_factors_by_qr])
@pytest.mark.parametrize("name", [*HEALTHY, *DEFICIENT])
def test_first_moments_are_those_of_momentum_at_the_new_factors(name: str, balance: Any) -> None:
    """Linear in the gradients, so exact; autograd at both points is the oracle."""
    b, a = (x.double() for x in _case(name))
    new = balance(b, a)
    (m_b, v_b), (m_a, v_a) = _averages(b, a, 5)
    (exact_b, _), (exact_a, _) = _averages(new.b, new.a, 5)
    bias = AdamBias.after(BETAS, 5)
    carry_moments(m_b, v_b, new.t_a.mT, bias)
    carry_moments(m_a.mT, v_a.mT, new.t_b, bias)
    live = new.singular_values > 0
    assert int((~live).sum()) == new.dead
    assert (new.dead > 0) is (name in DEFICIENT)
    for found, exact in ((m_b[:, live], exact_b[:, live]), (m_a[live], exact_a[live])):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))
    assert not m_b[:, ~live].any() and not m_a[~live].any()
    assert not v_b[:, ~live].any() and not v_a[~live].any()


def _formula(m: Any, v: Any, right: Any, betas: tuple[float, float], t: int) -> tuple[Any, Any]:
    """The carried moments by loops over numpy float64, as the page has them."""
    first, second = 1 - betas[0] ** t, 1 - betas[1] ** t
    new_m, new_v = np.zeros_like(m), np.zeros_like(v)
    least = (1 - betas[1]) * (1 - betas[0] ** 2 / betas[1]) / (1 - betas[0]) ** 2
    for i in range(m.shape[0]):
        for j in range(right.shape[1]):
            mean = spread = 0.0
            for k in range(m.shape[1]):
                old_m, old_v = m[i, k] / first, v[i, k] / second
                mu = np.sign(old_m) * min(abs(old_m), old_v**0.5)
                new_m[i, j] += m[i, k] * right[k, j]
                mean += mu * right[k, j]
                spread += (old_v - mu**2) * right[k, j] ** 2
            new_v[i, j] = max((spread + mean**2) * second, least * new_m[i, j] ** 2)
    return new_m, new_v


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9)])
@pytest.mark.parametrize("updates", [1, 7, 1000])
def test_second_moments_follow_the_formula_and_are_never_negative(
    betas: tuple[float, float], updates: int
) -> None:
    generator = torch.Generator().manual_seed(updates)
    m, right = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 6))
    v = torch.rand(9, 6, generator=generator, dtype=torch.float64)  # below m² for some
    v[0] = 0
    m[0] = 0
    expected = _formula(m.numpy(), v.numpy(), right.numpy(), betas, updates)
    carry_moments(m, v, right, AdamBias.after(betas, updates))
    for found, exact in zip((m, v), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-12, atol=1e-300)
    assert (v >= 0).all() and not v[0].any()


def test_what_is_exact_about_second_moments() -> None:
    """The identity changes no bit, a diagonal map and constant gradients are exact."""
    bias = AdamBias.after(BETAS, 3)
    (m, v), _ = _averages(torch.randn(8, 4).double(), torch.randn(4, 6).double(), 3)
    m, v = m.float(), v.float()
    one, two = m.clone(), v.clone()
    carry_moments(one, two, torch.eye(4, dtype=torch.float64), bias)
    assert torch.equal(one, m) and torch.equal(two, v)
    scales = torch.tensor([2.0, -0.5, 1e3, 1e-3], dtype=torch.float64)
    carry_moments(one, two, scales.diag(), bias)
    torch.testing.assert_close(two.double(), v.double() * scales**2, rtol=1e-6, atol=0)
    gradient, right = torch.randn(8, 4).double(), torch.randn(4, 4).double()
    first, second = gradient * bias.first, gradient**2 * bias.second
    carry_moments(first, second, right, bias)
    torch.testing.assert_close(second, (gradient @ right) ** 2 * bias.second)
    # Large momentum against cancelled squares: the step stays below what Adam can make.
    first, second = torch.tensor([[3.0, 3.0]]).double(), torch.tensor([[1e-4, 1e-6]]).double()
    carry_moments(first, second, torch.tensor([[1.0, 0.0], [-0.1, 1.0]]).double(), bias)
    assert (first**2 * bias.least <= second).all()


def _whole(work: FactorRounds, moment: str | None = None) -> list[tuple[Tensor, Tensor]]:
    """B and A of every pair, or their moments, float64 copies on every rank."""
    mine = {}
    for index in range(len(work.rounds)):
        owned = work.rounds[index][work.ranks.rank]
        for pair, (b, a) in zip(owned, work.to_owners(index, moment), strict=True):
            mine[pair] = (b.double().clone(), a.double().clone())
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    joined = {k: v for part in parts for k, v in part.items()}
    return [joined[i] for i in range(len(work.pairs))]


def _carried(kind: str) -> dict[str, float]:
    """Largest errors after three updates and a restart, as shares of the largest moment."""
    with engine_of(kind) as engine:
        pairs = engine.module.factor_pairs()
        config = RestartsConfig(every=4, reset="transport", verify=True)
        restarts = Restarts(config, engine, pairs, 100, lambda _: 1.0)
        for update in range(4):
            train(engine, update)
        work = FactorRounds(EngineState(engine), pairs, 1000)
        names = (None, "exp_avg", "exp_avg_sq")
        (old, old_m, old_v) = (_whole(work, name) for name in names)
        rest = _others(engine, work)
        done = 5 if kind == "bf16 stage 0" else 4  # DeepSpeed starts that one with a step on zeros
        report = restarts.after_update(4)
        assert report is not None and report.moments_transported and not report.reset
        (new, new_m, new_v) = (_whole(work, name) for name in names)
        worst = {"first": 0.0, "second": 0.0}
        for (b, a), m, v, (b2, a2), m2, v2 in zip(
            old, old_m, old_v, new, new_m, new_v, strict=True
        ):
            # T = AA'ᵀ S⁻¹ and T⁻¹ = S⁻¹ B'ᵀB from the factors, S by the SVD of the product.
            singular = torch.linalg.svdvals(b @ a)[: b.shape[1]]
            inverse = torch.where(singular > 1e-9 * singular[0], 1 / singular, 0.0)
            t_b, t_a = a @ a2.mT * inverse, inverse.unsqueeze(1) * (b2.mT @ b)
            for i, right, flip in ((0, t_a.mT, False), (1, t_b, True)):
                given = [x[i].mT if flip else x[i] for x in (m, v, m2, v2)]
                expected = _formula(*(x.numpy() for x in (*given[:2], right)), BETAS, done)
                for key, got, exact in zip(worst, given[2:], expected, strict=True):
                    error = np.abs(got.numpy() - exact).max() / max(np.abs(exact).max(), 1e-30)
                    worst[key] = max(worst[key], float(error))
        for before, after in zip(rest, _others(engine, work), strict=True):
            assert torch.equal(before, after)
        train(engine, 4)
        return worst


def _others(engine: Any, work: FactorRounds) -> list[Tensor]:
    """Copies of this rank's moments of everything that is no factor."""
    state = EngineState(engine)
    factors = {id(p) for pair in work.pairs for p in (pair.b, pair.a)}
    return [
        moment.clone()
        for parameter in state.parameters()
        if id(parameter) not in factors
        for moment in state.states(parameter).values()
    ]


FEW = ["fp32 stage 0", "bf16 stage 1", "fp32 stage 3", "fp32 stage 2 offload"]


@pytest.mark.parametrize(("world_size", "kind"), on_ranks(KINDS, FEW))
def test_every_engine_carries_the_moments_of_its_factors_and_no_others(
    world_size: int, kind: str
) -> None:
    # Masters in bf16 are rounded before the oracle sees them.
    close = 6e-2 if kind.startswith("paper") else 2e-5
    for worst in run_distributed(_carried, world_size, kind):
        assert worst["first"] < close and worst["second"] < close


TRANSPORT = {"restarts": {"every": 4, "reset": "transport"}, "optimizer": {"lr": 0.002}}


def check_runs(
    ranks: int, stage: int, sections: dict[str, Any], data: Path, folder: Path, within: float
) -> None:
    """Losses of several ranks are those of one ``within`` a bound, and the same bits resumed."""
    sections = {**sections, "checkpoint": {"every": 5, "keep_last": 9}}
    alone, shared = folder / "alone", folder / "shared"
    run_distributed(run, 1, settings(alone, data, **sections), zero(0))
    values = settings(shared, data, **sections)
    run_distributed(run, ranks, values, zero(stage))
    assert losses(shared) == pytest.approx(losses(alone), abs=within)
    restarts = events(shared, "restart")
    assert [e["update"] for e in restarts] == [4, 8]
    assert all(e["moments_transported"] and not e["reset"] for e in restarts)
    unbroken = losses(shared)
    _cut_back(shared, 5)
    (shared / "metrics.jsonl").unlink()
    run_distributed(run, ranks, values, zero(stage))
    assert losses(shared) == unbroken[5:]


@pytest.mark.parametrize(
    "ranks, stage, method",
    [(2, 1, "low_rank"), (3, 2, "sltrain"), (2, 3, "sltrain"), (2, 0, "lora")],
)
def test_a_run_is_the_same_on_any_ranks_and_resumes_bitwise(
    ranks: int, stage: int, method: str, data: Path, tmp_path: Path
) -> None:
    sections = {**TRANSPORT, **METHODS.get(method, {})}
    check_runs(ranks, stage, sections, data, tmp_path, 1e-5)


def test_skipped_updates_leave_nothing_to_carry() -> None:
    """Before the first update there are no moments: the factors are balanced alone."""
    assert run_distributed(_without_moments, 2) == [(True, False, 0)] * 2


def _without_moments() -> tuple[bool, bool, int]:
    with engine_of("fp32 stage 1") as engine:
        pairs = engine.module.factor_pairs()
        config = RestartsConfig(every=4, reset="transport")
        report = Restarts(config, engine, pairs, 100, lambda _: 1.0).after_update(4)
        assert report is not None
        updates = MomentTransport(FactorRounds(EngineState(engine), pairs)).updates
        return report.refactorized, report.moments_transported, updates


@pytest.mark.parametrize(
    "values, message",
    [
        ({"reset_every": 5}, "there are none: set every, refactorize_every or imbalance_threshold"),
        ({"every": 5, "reset_every": 9}, "zeroes nothing, so reset_every cannot act"),
        ({"every": 5, "lr_recovery": "linear"}, "zeroes nothing, so lr_recovery cannot act"),
        ({"every": 5, "reset_counter": "keep", "reset_scope": "factors"}, "reset_scope, reset_c"),
    ],
)
def test_keys_that_contradict_transport_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RestartsConfig(reset="transport", **values)


def test_other_optimizers_are_refused(data: Path, tmp_path: Path) -> None:
    values = settings(tmp_path / "run", data, **TRANSPORT)
    values["optimizer"] = {"name": "stable_spam", "lr": 0.002}
    with pytest.raises(RankFailed, match=r"UserError.*StableSPAM keeps other states"):
        run_distributed(run, 1, values, zero(0))
    weight = torch.nn.Parameter(torch.ones(2))
    check_transport(torch.optim.AdamW([weight]), [[weight]], [])
    for optimizer in (torch.optim.AdamW([weight], amsgrad=True), torch.optim.SGD([weight])):
        with pytest.raises(UserError, match=r"restarts\.reset = transport"):
            check_transport(optimizer, [[weight]], [])
