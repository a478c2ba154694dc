"""Learning rates of runs whose length changes on the way, by hand and bitwise through resumes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from megalr.checkpoint.manifest import Damaged
from megalr.checkpoint.source import SavedState
from megalr.config.schema import RunConfig
from megalr.run.extension import continued_plan
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, run, settings, zero
from tests.training.test_resume import _cut_back

COUNTERS = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
PEAK = 0.01


def _config(updates: int, name: str = "cosine", lr: float = PEAK, **schedule: Any) -> RunConfig:
    sections: dict[str, Any] = {"train": {"updates": updates}, "optimizer": {"lr": lr}}
    values = settings(Path("runs/a b"), Path("data"), **sections)
    values["schedule"] = {"name": name, "warmup_updates": 2, **schedule}
    return RunConfig.model_validate(values)


def _saved(config: RunConfig, update: int, history: Any = None, **state: Any) -> SavedState:
    state |= {"tokens": 0, "extensions": history}
    return SavedState(update, config.model_dump(mode="json"), COUNTERS, state)


def _cosine(t: float, total: int, floor: float = 0.1) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t - 2) / (total - 2)))


def test_rescale_is_the_schedule_of_the_new_length_and_warns() -> None:
    plan = continued_plan(_config(20), _saved(_config(10), 10))
    assert plan.history is None
    expected = [_cosine(t, 20) for t in range(2, 20)]
    assert [plan.factor(t) for t in range(2, 20)] == pytest.approx(expected)
    warning, offer = plan.notes
    now = f"{PEAK * _cosine(10, 20):.4g}"
    assert warning == (
        "warning: train.updates 10 -> 20: at update 10 the learning rate is 0.001 by the old "
        f"schedule and {now} by the new one"
    )
    assert "schedule.on_extend=hold" in offer and "schedule.on_extend=decay" in offer
    assert plan.changed["extended"] == {
        "updates": [10, 20],
        "on_extend": "rescale",
        "learning_rates": pytest.approx([0.001, PEAK * _cosine(10, 20), PEAK * _cosine(10, 20)]),
    }


@pytest.mark.parametrize("update", [6, 10])  # before its end and at it
def test_hold_and_decay_go_from_the_last_learning_rate(update: int) -> None:
    last = _cosine(update - 1, 10)
    held = continued_plan(_config(20, on_extend="hold"), _saved(_config(10), update))
    assert [held.factor(t) for t in range(2, update)] == pytest.approx(
        [_cosine(t, 10) for t in range(2, update)]
    )
    assert [held.factor(t) for t in range(update - 1, 30)] == pytest.approx([last] * (31 - update))
    assert f"it stays at {PEAK * last:.4g}" in held.notes[1]
    floor = 0.05
    lower = _config(20, on_extend="decay", min_lr_ratio=floor)
    decayed = continued_plan(lower, _saved(_config(10), update))
    span = 20 - update
    line = [last + (floor - last) * k / span for k in range(span + 1)]
    assert [decayed.factor(t) for t in range(update, 21)] == pytest.approx(line)
    assert decayed.factor(5) == pytest.approx(_cosine(5, 10))
    assert f"from {PEAK * last:.4g} along a line to 0.0005" in decayed.notes[1]


def test_extensions_follow_on_each_other_and_their_checkpoints_continue_them() -> None:
    first = _config(10)
    held = _config(16, on_extend="hold")
    plan = continued_plan(held, _saved(first, 10))
    same = continued_plan(held, _saved(held, 13, plan.history))
    assert same.history == plan.history and same.notes == [] and same.changed == {}
    assert [same.factor(t) for t in range(40)] == [plan.factor(t) for t in range(40)]
    # The choice was made when it was extended; the key alone changes nothing later.
    later = continued_plan(_config(16, on_extend="decay"), _saved(held, 13, plan.history))
    assert later.factor(15) == plan.factor(15)

    last = _cosine(9, 10)
    decayed = continued_plan(
        _config(20, on_extend="decay", min_lr_ratio=0.0), _saved(held, 16, plan.history)
    )
    assert [decayed.factor(t) for t in range(10, 16)] == pytest.approx([last] * 6)
    assert [decayed.factor(t) for t in range(16, 21)] == pytest.approx(
        [last * (1 - k / 4) for k in range(5)]
    )
    # Back to the schedule of the whole length, which forgets them.
    whole = continued_plan(_config(30), _saved(held, 16, plan.history))
    assert whole.history is None and whole.factor(20) == pytest.approx(_cosine(20, 30))
    assert whole.changed["extended"]["learning_rates"][0] == pytest.approx(PEAK * last)


def test_a_stable_phase_goes_on_without_a_warning() -> None:
    wsd = {"name": "wsd", "decay_updates": 4}
    plan = continued_plan(_config(20, **wsd), _saved(_config(10, **wsd), 6))
    assert plan.notes == [] and plan.factor(15) == 1.0
    (warning, _) = continued_plan(_config(20, **wsd), _saved(_config(10, **wsd), 8)).notes
    assert re.search("update 8 the learning rate is 0.002929 by the old .* 0.01 by the", warning)
    held = continued_plan(_config(20, **wsd, on_extend="hold"), _saved(_config(10, **wsd), 6))
    assert held.factor(19) == 1.0 and "it stays at 0.01" in held.notes[1]


def test_another_peak_or_schedule_is_shown_without_an_offer() -> None:
    constant = _config(20, "constant")
    (line,) = continued_plan(constant, _saved(_config(20), 11)).notes
    assert line.startswith("warning: another schedule: at update 11 the learning rate is 0.0055 ")
    assert continued_plan(_config(30, "constant"), _saved(constant, 11)).notes == []
    forked = continued_plan(_config(30), _saved(_config(20), 11), forked=True)
    assert len(forked.notes) == 1 and len(forked.changed["learning_rates"]) == 2


def test_a_finished_run_says_how_to_extend_it() -> None:
    config = _config(10)
    assert continued_plan(config, _saved(config, 10)).notes == [
        "run.dir runs/a b is already finished (10 updates); to extend: megalr train --resume "
        "'runs/a b' --allow train.updates train.updates=20 schedule.on_extend=hold"
    ]
    assert continued_plan(config, _saved(config, 10, evaluation_pending=True)).notes == []
    assert continued_plan(config, _saved(config, 9)).notes == []


@pytest.mark.parametrize("history", [{}, {"schedule": 5}, {"updates": -1}])
def test_extensions_that_no_run_wrote_are_damage(history: Any) -> None:
    with pytest.raises(Damaged, match=r"state\.json: extensions: "):
        continued_plan(_config(10), _saved(_config(10), 5, history))


def _run_allowed(values: dict[str, Any], allowed: list[str]) -> None:
    from megalr.training.pretrain import pretrain

    pretrain(RunConfig.model_validate(values), zero(1), "test.json", None, allowed)


@pytest.mark.parametrize(
    "choice", ["rescale", *(pytest.param(c, marks=pytest.mark.long) for c in ("hold", "decay"))]
)
def test_an_extended_run_is_resumed_bitwise(choice: str, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    every = {"checkpoint": {"every": 1, "keep_last": 20}, "evaluation": {"every": 0}}
    run_distributed(run, 2, settings(folder, data, **every, train={"updates": 5}), zero(1))
    schedule = {"on_extend": choice, "min_lr_ratio": 0.0}
    longer = settings(folder, data, **every, train={"updates": 8}, schedule=schedule)
    with pytest.raises(RankFailed, match=r"train\.updates: 5 there, 8 here") as refused:
        run_distributed(run, 2, longer, zero(1))
    assert "on_extend:" not in str(refused.value)
    allowed = ["train.updates", "schedule.min_lr_ratio"]
    run_distributed(_run_allowed, 2, longer, allowed)
    (resumed,) = events(folder, "resume")
    assert resumed["extended"]["on_extend"] == choice
    keys = ("update", "loss", "gradient_norm", "learning_rate")
    unbroken = [[event[key] for key in keys] for event in events(folder, "step")]
    rates = [event["learning_rate"] for event in events(folder, "step")][5:]
    last = events(folder, "step")[4]["learning_rate"]
    assert last == pytest.approx(PEAK * (0.1 + 0.9 * 0.5))  # half-way from 3 to 5
    expected = {
        "rescale": [PEAK * 0.5 * (1 + math.cos(math.pi * (t - 3) / 5)) for t in (5, 6, 7)],
        "hold": [last] * 3,
        "decay": [last, last * 2 / 3, last / 3],
    }
    assert rates == pytest.approx(expected[choice])
    for update in (5, 6):
        _cut_back(folder, update)
        (folder / "metrics.jsonl").unlink()
        # What was allowed is the run's configuration now.
        run_distributed(run, 2, longer, zero(1))
        again = [[event[key] for key in keys] for event in events(folder, "step")]
        assert again == unbroken[update:]
