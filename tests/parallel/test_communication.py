"""The collectives that run are those of the formula, number by number."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megalr.models.build import build_decoder
from megalr.models.communication import Traffic, traffic
from megalr.parallel.plan import Plan
from tests.distributed import run_distributed
from tests.parallel.meshes import CASES, mesh, sizes

SHAPE = (2, 9)
TOKENS = SHAPE[0] * SHAPE[1]


class _Counter:
    """Counts what goes through torch.distributed, in numbers that enter each collective."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def hook(self, name: str, which: int) -> Any:
        real = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, args[which].numel()))
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, counted)

    def total(self, name: str) -> int:
        return sum(numel for found, numel in self.seen if found == name)


def _count(name: str, tensor: int) -> list[dict[str, int]]:
    method, layout = CASES[name]
    decoder = build_decoder(sizes(name), method, seed=4, plan=Plan(mesh(tensor), layout))
    torch.manual_seed(3)
    ids = torch.randint(0, 101, SHAPE)
    counts = []
    counter = _Counter()
    with (
        counter.hook("all_reduce", 0),
        counter.hook("all_gather_into_tensor", 0),
        counter.hook("reduce_scatter_tensor", 1),
    ):
        loss = decoder(ids, ids, 1.0)
        for step in (None, loss.backward):
            if step is not None:
                counter.seen.clear()
                step()
            counts.append(
                {
                    "reduced": counter.total("all_reduce"),
                    "gathered": counter.total("all_gather_into_tensor"),
                    "scattered": counter.total("reduce_scatter_tensor"),
                    "messages": len(counter.seen),
                }
            )
    for count, expected in zip(counts, traffic(decoder), strict=True):
        assert count["gathered"] == TOKENS * expected.gathered
        assert count["scattered"] == TOKENS * expected.scattered
        assert count["reduced"] == (
            TOKENS * (expected.reduced + expected.reduced_float32) + expected.weights
        )
    return counts


@pytest.mark.parametrize("name", CASES)
def test_numbers_sent_equal_the_formula(name: str) -> None:
    run_distributed(_count, 2, name, 2)


def test_low_rank_sends_r_numbers_and_one_message_a_group() -> None:
    """The table of docs/parallelism.md for h = 48, r = 8, two layers, by hand."""
    h, r, layers = 48, 8, 2
    forward, backward = run_distributed(_count, 2, "low_rank", 2)[0]
    assert forward["reduced"] == TOKENS * (h + 3 + layers * 2 * r)
    assert backward["reduced"] == TOKENS * (h + layers * 5 * r) + h
    # Embedding, loss (2), o and down; then head, last norm, q k v and gate up.
    assert forward["messages"] == 3 + layers * 2
    assert backward["messages"] == 2 + layers * 2
    forward, backward = run_distributed(_count, 2, "low_rank_bottleneck", 2)[0]
    assert forward["reduced"] == TOKENS * (3 + layers * (7 * r + 2))
    assert backward["reduced"] == TOKENS * layers * 7 * r + h
    assert forward["gathered"] == forward["scattered"] == TOKENS * h
    assert backward["gathered"] == backward["scattered"] == TOKENS * h
    forward, backward = run_distributed(_count, 2, "full_rank", 2)[0]
    assert forward["reduced"] == TOKENS * (h + 3 + layers * 2 * h)
    assert backward["reduced"] == TOKENS * (h + layers * 2 * h) + h


def test_bytes_on_a_ring() -> None:
    sent = Traffic(reduced=10, reduced_float32=2, gathered=6, scattered=4, weights=100)
    # 3/4 of each gathered or scattered number, twice that of each reduced one.
    expected = 0.75 * (2 * (2 * (5 * 10 + 100) + 4 * 5 * 2) + 2 * 5 * (6 + 4))
    assert sent.bytes_sent(tokens=5, ranks=4) == pytest.approx(expected)
