"""Learning-rate factors against transformers' schedulers and closed values."""

from __future__ import annotations

import math
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


def _wsd(warmup: int, decay: int, decay_type: str, floor: float) -> SimpleNamespace:
    settings = _settings("wsd", warmup, floor)
    return SimpleNamespace(**vars(settings), decay_updates=decay, decay_type=decay_type)


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "decay", "floor"), [(7, 13, 0.0), (0, 40, 0.1), (10, 30, 0.25)])
def test_wsd_equals_transformers_at_every_update(
    decay_type: str, warmup: int, decay: int, floor: float
) -> None:
    """Theirs warms up from the floor and ours from 0, so with a floor only what follows is theirs.

    50 rates are compared of a run of 40, so the end of the decay and what is beyond it too.
    """

    def theirs(optimizer: torch.optim.Optimizer) -> object:
        return transformers.get_wsd_schedule(
            optimizer, warmup, decay, 40, decay_type=decay_type, min_lr_ratio=floor
        )

    first = warmup if floor else 0
    schedule = make_schedule(_wsd(warmup, decay, decay_type, floor), 40)
    assert [schedule(t) for t in range(first, 50)] == pytest.approx(
        _scheduled(theirs)[first:], abs=1e-12
    )


def test_wsd_by_hand_and_its_stable_phase_is_that_of_any_length() -> None:
    schedule = make_schedule(_wsd(4, 16, "1-sqrt", 0.2), 40)
    assert [schedule(t) for t in (0, 2, 4, 23, 24)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert schedule(28) == pytest.approx(0.2 + 0.8 * (1 - 0.5))  # a quarter of the decay
    assert schedule(33) == pytest.approx(0.2 + 0.8 * (1 - 0.75))  # nine sixteenths
    assert schedule(40) == pytest.approx(0.2) == schedule(1000)
    stable = make_schedule(_wsd(4, 0, "1-sqrt", 0.2), 24)
    assert [stable(t) for t in range(24)] == [schedule(t) for t in range(24)]
    assert stable(24) == 1.0


def test_floor_warm_up_and_end() -> None:
    schedule = make_schedule(_settings("cosine", 10, 0.1), 110)
    assert [schedule(t) for t in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule(60) == pytest.approx(0.55)  # half-way: (1 + floor) / 2
    assert schedule(110) == pytest.approx(0.1) == schedule(1000)
    assert make_schedule(_settings("linear", 0, 0.2), 4)(2) == pytest.approx(0.6)


def test_jagged_cosine_is_that_of_the_formula() -> None:
    """ReLoRA (docs/methods/factorized.md): w 4, w2 3, C 20, N 60, floor 0.1."""
    settings = SimpleNamespace(
        **vars(_settings("cosine_restarts", 4, 0.1)),
        cycle_updates=20,
        restart_warmup_updates=3,
        adjust_updates=0,
    )
    schedule = make_schedule(settings, 60)

    def cosine(t: float) -> float:
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 4) / 56))

    assert [schedule(t) for t in (0, 2, 4)] == pytest.approx([0, 0.5, 1.0])
    assert [schedule(t) for t in (5, 19)] == pytest.approx([cosine(5), cosine(19)])
    ramp = [cosine(23) * k / 3 for k in range(3)]
    assert [schedule(t) for t in (20, 21, 22)] == pytest.approx(ramp)
    assert schedule(23) == pytest.approx(cosine(23))
    assert [schedule(t) for t in (40, 41, 59)] == pytest.approx([0, cosine(43) / 3, cosine(59)])
