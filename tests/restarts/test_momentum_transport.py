"""Carried momentum of Muon, NorMuon and Spectron: against autograd and SVDs in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalr.config.restarts import RestartsConfig
from megalr.engine.state import EngineState, attach_layouts
from megalr.errors import UserError
from megalr.optim import Muon, NorMuon, Spectron
from megalr.optim.groups import parameter_groups
from megalr.restarts.balance import balanced_factors, balanced_factors_by_qr
from megalr.restarts.controller import Restarts
from megalr.restarts.refactorize import factor_parameters
from megalr.restarts.transport import carry_momentum, check_transport
from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, make_decoder, train
from tests.restarts.test_balance import _case
from tests.restarts.test_transport import DEFICIENT, HEALTHY, _gradients, check_runs
from tests.training.test_methods import METHODS

BETA = 0.8
RULES: dict[str, Any] = {"muon": Muon, "normuon": NorMuon, "spectron": Spectron}
UPDATES = 4


def _momenta(b: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Momentum of B and of A after every one of some updates, at factors that stay; float64."""
    found = [(torch.zeros_like(b), torch.zeros_like(a))]
    for seed in range(UPDATES):
        gradients = _gradients(b, a, seed)
        found.append(
            tuple(BETA * m + (1 - BETA) * g for m, g in zip(found[-1], gradients, strict=True))  # type: ignore[arg-type]
        )
    return found[1:]


@pytest.mark.parametrize("balance", [balanced_factors, balanced_factors_by_qr])
@pytest.mark.parametrize("name", [*HEALTHY, *DEFICIENT])
def test_momentum_is_that_of_the_new_factors(name: str, balance: Any) -> None:
    b, a = (x.double() for x in _case(name))
    new = balance(b, a)
    (m_b, m_a), (exact_b, exact_a) = _momenta(b, a)[-1], _momenta(new.b, new.a)[-1]
    carry_momentum(m_b, new.t_a.mT)
    carry_momentum(m_a.mT, new.t_b)
    live = new.singular_values > 0
    assert not m_b[:, ~live].any() and not m_a[~live].any()
    for found, exact in ((m_b[:, live], exact_b[:, live]), (m_a[live], exact_a[live])):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))


def _polar(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("name", ["trained", "opposite scales"])
def test_second_moments_of_rows_are_those_of_the_new_factors_as_they_are(name: str) -> None:
    """With polar factors, which Newton-Schulz approximates, in the place of its results."""
    b, a = (x.double() for x in _case(name))
    new = balanced_factors(b, a)
    averages = []
    for momenta in (_momenta(b, a), _momenta(new.b, new.a)):
        rows = [torch.zeros(len(b)).double(), torch.zeros(len(a)).double()]
        for pair in momenta:
            for v, m in zip(rows, pair, strict=True):
                v.lerp_(_polar(m).square().mean(dim=1), 0.1)
        averages.append(rows)
    for before, after in zip(*averages, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-7, atol=0)
    assert averages[0][0].std() > 1e-3 * averages[0][0].mean()  # those of B are no constants


def _optimizer(name: str, **options: Any) -> Any:
    """Makes the optimizer of a decoder, with its mark on the factors."""

    def build(decoder: Any) -> Any:
        groups = parameter_groups(decoder, factor_parameters(decoder.factor_pairs()), 0.01)
        mark = "use_spectron" if name == "spectron" else "use_muon"
        groups = [{**group, mark: group["name"] == "factors"} for group in groups]
        return RULES[name](groups, lr=2e-3, momentum=BETA, **options)

    return build


def _states(engine: Any) -> dict[str, Tensor]:
    """Every state by tensor and name, whole on every rank, read from the optimizer's dicts."""
    base, mine = EngineState(engine).base, []
    for entry, state in base.state.items():
        for tensor, fragment in base.layout(entry).local:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() == entry.numel():
                    part = fragment.of(value.view(-1)).double().cpu()
                    mine.append((f"{tensor.name} {key}", tensor.shape, fragment.start, part))
        for name, own in state.get("matrices", {}).items():
            for key, value in own.items():
                mine.append((f"{name} {key}", value.shape, 0, value.double().cpu().view(-1)))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    whole: dict[str, Tensor] = {}
    for name, shape, start, values in (entry for part in parts for entry in part):
        flat = whole.setdefault(name, torch.full(shape, torch.nan).double()).view(-1)
        flat[start : start + len(values)] = values
    return {name: value.clone() for name, value in whole.items()}


def _factors(engine: Any) -> dict[str, Tensor]:
    """B and A of every pair, whole: the parameters that the model computes with, in float32."""
    found = {}
    for pair in engine.module.factor_pairs():
        found[f"{pair.name}.B"] = pair.b.detach()[slice(*pair.b_rows)].double().clone()
        found[f"{pair.name}.A"] = pair.a.detach()[slice(*pair.a_rows)].double().clone()
    return found


def _carried(kind: str, name: str) -> tuple[float, int]:
    """Largest error of a momentum after four updates and a restart; number of other states."""
    with engine_of(kind, optimizer=_optimizer(name)) as engine:
        attach_layouts(engine)
        pairs = engine.module.factor_pairs()
        config = RestartsConfig(every=4, reset="transport", verify=True)
        restarts = Restarts(config, engine, pairs, 100, lambda _: 1.0)
        for update in range(4):
            train(engine, update)
        old, before = _factors(engine), _states(engine)
        report = restarts.after_update(4)
        assert report is not None and report.moments_transported and not report.reset
        new, after = _factors(engine), _states(engine)
        worst, carried = 0.0, set()
        for pair in pairs:
            b, a, b2, a2 = (x[f"{pair.name}.{f}"] for x in (old, new) for f in "BA")
            inverse = 1 / torch.linalg.svdvals(b @ a)[: pair.rank]  # T = AA'ᵀ S⁻¹, T⁻¹ = S⁻¹ B'ᵀB
            t, t_inverse = a @ a2.mT * inverse, inverse.unsqueeze(1) * (b2.mT @ b)
            for key, map_ in ((f"{pair.name}.B", None), (f"{pair.name}.A", t)):
                m, m2 = (x[f"{key} momentum_buffer"] for x in (before, after))
                exact = m @ t_inverse.mT if map_ is None else map_.mT @ m
                assert not torch.allclose(m, exact, rtol=0.1)
                worst = max(worst, float((m2 - exact).abs().max() / exact.abs().max()))
                carried.add(f"{key} momentum_buffer")
        assert before.keys() == after.keys()
        others = before.keys() - carried
        assert all(torch.equal(before[key], after[key]) for key in others)
        train(engine, 4)
        return worst, len(others)


@pytest.mark.parametrize(
    "ranks, kind, name",
    [
        (1, "fp32 stage 0", "muon"),
        (2, "fp32 stage 1", "muon"),
        (2, "fp32 stage 2", "normuon"),
        (2, "fp32 stage 2 offload", "normuon"),
        (3, "fp32 stage 1", "spectron"),
        (1, "fp32 stage 2 offload", "spectron"),
    ],
)
def test_every_engine_carries_the_momentum_of_its_factors_and_nothing_else(
    ranks: int, kind: str, name: str
) -> None:
    for worst, others in run_distributed(_carried, ranks, kind, name):
        assert worst < 2e-5
        assert others > 10


TRANSPORT = {"restarts": {"every": 4, "reset": "transport", "verify": True}}


@pytest.mark.parametrize(
    "ranks, stage, name",
    [
        (2, 1, "muon"),
        pytest.param(3, 2, "muon", marks=pytest.mark.long),
        pytest.param(2, 3, "muon", marks=pytest.mark.long),
        pytest.param(2, 2, "normuon", marks=pytest.mark.long),
        (2, 2, "spectron"),
    ],
)
def test_a_run_is_the_same_on_any_ranks_and_resumes_bitwise(
    ranks: int, stage: int, name: str, data: Path, tmp_path: Path
) -> None:
    check_runs(ranks, stage, {**TRANSPORT, **METHODS[name]}, data, tmp_path, 1e-4)


def test_a_momentum_that_is_not_linear_or_not_there_is_refused() -> None:
    decoder = make_decoder()
    pairs = decoder.factor_pairs()

    def check(optimizer: Any) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        check_transport(optimizer, groups, pairs)

    check(_optimizer("normuon")(decoder))
    with pytest.raises(UserError, match=r"optimizer.fraction below 1 that of Muon decays by rows"):
        check(_optimizer("muon", fraction=0.25)(decoder))
    with pytest.raises(UserError, match=r"put them into groups with use_muon"):
        check(Muon(decoder.parameters(), lr=1e-3))
    other = make_decoder()
    with pytest.raises(UserError, match=r"not all factors have one of their own"):
        check(Muon(other.embedding.parameters(), lr=1e-3))
