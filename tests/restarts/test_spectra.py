"""What a refactorization records of the singular values, against explicit products and numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalr.config.restarts import RestartsConfig
from megalr.engine.state import EngineState
from megalr.restarts.controller import Restarts
from megalr.restarts.rounds import FactorRounds
from megalr.restarts.spectra import QUANTILES, effective_rank
from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, on_ranks, train


def _whole_factors(engine) -> list[tuple[str, float, np.ndarray, np.ndarray]]:
    """(name, scale, B, A) of all pairs, float64, on every rank."""
    work = FactorRounds(EngineState(engine), engine.module.factor_pairs())
    mine = {}
    for index in range(len(work.rounds)):
        owned = work.rounds[index][work.ranks.rank]
        for pair, factors in zip(owned, work.to_owners(index), strict=True):
            mine[pair] = [factor.double().numpy().copy() for factor in factors]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    joined = {index: factors for part in parts for index, factors in part.items()}
    return [(p.name, p.scale, *joined[index]) for index, p in enumerate(work.pairs)]


def _spectra(kind: str) -> tuple:
    with engine_of(kind) as engine:
        config = RestartsConfig(refactorize_every=2)
        restarts = Restarts(config, engine, engine.module.factor_pairs(), 100, lambda t: 1.0)
        for update in range(2):
            train(engine, update)
        factors = _whole_factors(engine)
        return factors, restarts.after_update(2).metrics()


@pytest.mark.parametrize(
    ("world_size", "kind"),
    on_ranks(["fp32 stage 2", "bf16 stage 3"], ["fp32 stage 0"]),
)
def test_recorded_spectra_are_those_of_the_products(world_size: int, kind: str) -> None:
    for factors, metrics in run_distributed(_spectra, world_size, kind):
        recorded = json.loads(json.dumps(metrics))["spectra"]
        assert list(recorded) == ["q", "k", "v", "o", "gate", "up", "down"]
        for projection, found in recorded.items():
            of_kind = [entry for entry in factors if entry[0].endswith("." + projection)]
            assert len(of_kind) == 2  # layers
            rank = of_kind[0][2].shape[1]
            spectra, ranks, imbalances = [], [], []
            for _, scale, b, a in of_kind:
                values = scale * np.linalg.svd(b @ a, compute_uv=False)[:rank]
                spectra.append(values)
                share = values / values.sum()
                ranks.append(np.exp(-(share * np.log(share)).sum()))
                gram_b, gram_a = b.T @ b, a @ a.T
                total = np.linalg.norm(gram_b) + np.linalg.norm(gram_a)
                imbalances.append(np.linalg.norm(gram_b - gram_a) / total)
            expected = np.quantile(np.concatenate(spectra), QUANTILES)
            np.testing.assert_allclose(found["singular_values"], expected, rtol=1e-7)
            assert found["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-7)
            assert found["imbalance"] == pytest.approx(max(imbalances), rel=1e-7)
            assert found["rank"] == rank == 5


def test_effective_rank_counts_equal_directions_and_ignores_zero_ones() -> None:
    values = torch.tensor([[2.0, 0, 0, 0], [3, 3, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert effective_rank(values.double()).tolist() == pytest.approx([1, 2, 4, 0])
