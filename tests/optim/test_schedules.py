"""Learning-rate factors against transformers' schedulers and closed values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from megalr.optim.schedules import make_schedule


def _settings(name: str, warmup: int, floor: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, warmup_updates=warmup, min_lr_ratio=floor)


def _scheduled(make: object, *arguments: int) -> list[float]:
    """Learning rates that a torch scheduler gives to updates 0, 1, ..."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, *arguments)  # type: ignore[operator]
    rates = []
    for _ in range(50):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
def test_floorless_schedules_equal_transformers(warmup: int) -> None:
    pairs = {
        "cosine": (transformers.get_cosine_schedule_with_warmup, (warmup, 50)),
        "linear": (transformers.get_linear_schedule_with_warmup, (warmup, 50)),
        "constant": (transformers.get_constant_schedule_with_warmup, (warmup,)),
    }
    for name, (reference, arguments) in pairs.items():
        schedule = make_schedule(_settings(name, warmup, 0.0), 50)
        ours = [schedule(t) for t in range(50)]
        assert ours == pytest.approx(_scheduled(reference, *arguments), abs=1e-12)


def test_floor_warm_up_and_end() -> None:
    schedule = make_schedule(_settings("cosine", 10, 0.1), 110)
    assert [schedule(t) for t in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule(60) == pytest.approx(0.55)  # half-way: (1 + floor) / 2
    assert schedule(110) == pytest.approx(0.1) == schedule(1000)
    assert make_schedule(_settings("linear", 0, 0.2), 4)(2) == pytest.approx(0.6)
