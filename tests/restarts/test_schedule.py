"""When restarts are due and which learning rate follows, against counting and closed formulas."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from megalr.config.restarts import RestartsConfig
from megalr.restarts.schedule import RestartSchedule


def _schedule(total: int, base=lambda t: 1.0, **settings) -> RestartSchedule:
    return RestartSchedule(RestartsConfig(**settings), total, base)


def _resets(schedule: RestartSchedule) -> list[int]:
    return [u for u in range(1, schedule.total_updates + 1) if schedule.reset_due(u)]


def test_a_period_that_does_not_divide_the_run_means_what_it_says() -> None:
    assert _resets(_schedule(25, every=7)) == [7, 14, 21]
    assert _resets(_schedule(5, every=7)) == []
    assert _resets(_schedule(3, every=1)) == [1, 2, 3]


def test_phase_window_and_independent_periods() -> None:
    schedule = _schedule(30, every=10, refactorize_every=6, phase=4, start_after=4, stop_before=6)
    assert _resets(schedule) == [14, 24]
    assert [u for u in range(1, 31) if schedule.refactorize_due(u)] == [10, 16, 22]
    only_reset = _schedule(30, reset_every=10)
    assert not any(only_reset.refactorize_due(u) for u in range(1, 31))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_exactly_r_updates_after_a_reset_are_below_the_schedule_and_rise(shape: str) -> None:
    schedule = _schedule(
        30, lambda t: 2.0, every=10, lr_recovery=shape, recovery_updates=4, start_after=10
    )
    factors = [schedule.learning_rate_factor(t) / 2.0 for t in range(30)]
    line = [0.2, 0.4, 0.6, 0.8]
    ramp = line if shape == "linear" else [0.5 * (1 - math.cos(math.pi * x)) for x in line]
    assert factors[:20] == [1.0] * 20
    assert factors[20:24] == pytest.approx(ramp)
    assert factors[24:] == [1.0] * 6


def test_recovery_after_the_last_allowed_reset_and_longer_than_the_period() -> None:
    schedule = _schedule(20, every=4, lr_recovery="linear", recovery_updates=7, stop_before=10)
    factors = [schedule.learning_rate_factor(t) for t in range(20)]
    assert factors[4:8] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert factors[8:16] == pytest.approx([i / 8 for i in range(1, 9)])
    assert factors[16:] == [1.0] * 4


def test_a_triggered_reset_starts_a_recovery_of_its_own() -> None:
    schedule = _schedule(20, every=10, lr_recovery="linear", recovery_updates=3)
    assert [schedule.learning_rate_factor(t, 13) for t in range(12, 18)] == pytest.approx(
        [0.75, 0.25, 0.5, 0.75, 1.0, 1.0]
    )
    assert schedule.learning_rate_factor(21, 13) == pytest.approx(0.5)


def _normal(t: int, total: int, warmup: int, floor: float = 0.1) -> float:
    if t < warmup:
        return t / max(1, warmup)
    return floor + (1 - floor) * 0.5 * (
        1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup))
    )


def _published_scheduler(total: int, warmup: int, period: int, steps: int) -> list[float]:
    """The published loop, played: a LambdaLR rebuilt with last_epoch=u at every restart.

    torch computes a scheduler's first value for last_epoch + 1, and one more for every step."""
    cycle = period if total % period == 0 else total

    def quick_recovery(t: int) -> float:
        past = t % cycle
        if past < steps:
            target = _normal(cycle * (t // cycle) + steps, total, warmup)
            return target * (0.001 + 0.999 * min(1.0, past / (steps - 1)))
        return _normal(t, total, warmup)

    factors = []
    function, epoch = (lambda t: _normal(t, total, warmup)), 0
    for done in range(1, total + 1):
        factors.append(function(epoch))
        epoch += 1
        if done % period == 0:
            function, epoch = quick_recovery, done + 1
    return factors


@pytest.mark.parametrize(
    ("total", "warmup", "period", "steps"), [(1100, 110, 20, 10), (60, 5, 10, 3), (50, 5, 7, 4)]
)
def test_published_compat_equals_the_published_loop(
    total: int, warmup: int, period: int, steps: int
) -> None:
    schedule = _schedule(
        total,
        lambda t: _normal(t, total, warmup),
        every=period,
        compat="published",
        recovery_updates=steps,
    )
    ours = [schedule.learning_rate_factor(t) for t in range(total)]
    assert ours == pytest.approx(_published_scheduler(total, warmup, period, steps), abs=1e-15)


def test_published_compat_has_the_documented_values_of_the_paper_setting() -> None:
    schedule = _schedule(11000, lambda t: _normal(t, 11000, 1100), every=200, compat="published")
    target = 210 / 1100
    assert schedule.learning_rate_factor(200) == pytest.approx(0.112 * target, rel=1e-9)
    assert schedule.learning_rate_factor(209) == pytest.approx(210 / 1100)
    assert schedule.learning_rate_factor(399) == pytest.approx(0.00037, abs=5e-6)
    assert schedule.learning_rate_factor(199) == pytest.approx(199 / 1100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "greater than or equal to 1"),
        ({"reset_every": -5}, "greater than or equal to 1"),
        ({"every": 10, "phase": 10}, "phase 10 must be smaller than the period 10"),
        ({"lr_recovery": "linear"}, "lr_recovery needs resets"),
        ({"refactorize_every": 5, "lr_recovery": "cosine"}, "lr_recovery needs resets"),
        ({"compat": "published"}, "compat published needs a period"),
        ({"every": 5, "compat": "published", "phase": 2}, "compat published fixes phase"),
        ({"every": 5, "reset_moments": ["first", "first"]}, "name a moment twice"),
        ({"every": 5, "reset_moments": []}, "at least 1 item"),
        ({"imbalance_threshold": 1.5}, "less than 1"),
        ({"evry": 5}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RestartsConfig(**settings)
