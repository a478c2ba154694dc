"""Refactorization of sharded factors gives the shards of the refactorized whole factors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megalr.restarts.balance import balance_in_place
from megalr.restarts.refactorize import largest_imbalance
from megalr.sharding.tensor_shard import shard_range
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import mesh

M, N, RANK = 24, 32, 6
SHARDED = [(True, False), (False, True), (True, True)]  # column_row (two kinds), bottleneck


def _pairs(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for _ in SHARDED:
        b = torch.randn(M, RANK, generator=generator)
        a = torch.randn(RANK, N, generator=generator)
        if kind == "dead":  # two directions without effect
            b[:, 4:] = 0
        if kind == "ill":
            b = b * torch.logspace(0, -7, RANK)
            b[:, 5] = b[:, 4] * (1 + 1e-7)
        b[-3:] = 0  # padding
        pairs.append((b, a))
    return pairs


def _balanced_in_parts(kind: str, tensor: int) -> None:
    place = mesh(tensor).tensor_rank
    whole = _pairs(kind)
    parts = []
    for (b, a), (b_sharded, a_sharded) in zip(_pairs(kind), SHARDED, strict=True):
        rows = slice(*shard_range(M, place, tensor)) if b_sharded else slice(None)
        columns = slice(*shard_range(N, place, tensor)) if a_sharded else slice(None)
        parts.append((b[rows].clone(), a[:, columns].clone()))
    before = [b.double() @ a.double() for b, a in whole]
    expected = balance_in_place(whole, workspace_bytes=1 << 20)
    found = balance_in_place(
        parts, workspace_bytes=1 << 20, shards=SHARDED, group=mesh(tensor).tensor_group
    )
    for one, other in zip(found, expected, strict=True):
        assert (one.by_qr, one.dead, one.reseeded) == (other.by_qr, other.dead, other.reseeded)
        scale = float(other.singular_values[0])
        torch.testing.assert_close(
            one.singular_values, other.singular_values, rtol=1e-9, atol=1e-9 * scale
        )
        torch.testing.assert_close(one.imbalance, other.imbalance)
    assert any(one.by_qr for one in expected) == (kind != "healthy")
    for index, ((b_sharded, a_sharded), product) in enumerate(zip(SHARDED, before, strict=True)):
        rows = slice(*shard_range(M, place, tensor)) if b_sharded else slice(None)
        columns = slice(*shard_range(N, place, tensor)) if a_sharded else slice(None)
        b, a = parts[index]
        # The product did not move, and where the factors are unique they are those of the whole.
        torch.testing.assert_close(
            b.double() @ a.double(), product[rows, columns], rtol=1e-5, atol=1e-5
        )
        if kind == "healthy":
            torch.testing.assert_close(b, whole[index][0][rows], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a, whole[index][1][:, columns], rtol=1e-5, atol=1e-5)
        if b_sharded and place == tensor - 1:
            assert not b[-3:].any()


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("kind", ["healthy", "dead", "ill"])
def test_parts_of_factors_are_balanced_like_the_whole(kind: str, tensor: int) -> None:
    run_distributed(_balanced_in_parts, tensor, kind, tensor)


def _imbalance_of_unequal_copies() -> float:
    """The imbalance that ranks see if a replicated factor differs on one of them."""
    place = mesh(2)
    groups = [place.data_group, place.tensor_group]
    state = SimpleNamespace(
        device="cpu", tensor_group=place.tensor_group, all_groups=lambda: groups
    )
    b, a = torch.eye(4) * (1.0 + place.tensor_rank), torch.eye(4)
    exchange = SimpleNamespace(
        state=state,
        rounds=[[]],
        to_owners=lambda _: [(b, a)],
        residuals=lambda _: [None],
        shards=lambda _: [(False, False)],
    )
    return largest_imbalance(exchange)  # type: ignore[arg-type]


def test_tensor_parallel_ranks_decide_by_the_same_imbalance() -> None:
    # B'B = 4 I, AA' = I on the second rank: 3 / (4 + 1); the first alone would see 0.
    assert run_distributed(_imbalance_of_unequal_copies, 2) == [pytest.approx(0.6)] * 2
