"""Every log line has the time of its own updates, on a clock that only the test moves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megalr.training import context, trainer
from megalr.training.step_log import Stopwatch
from megalr.training.trainer import Trainer
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero


class _Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_lap_ends_when_it_is_called_and_not_when_it_is_read() -> None:
    clock = _Clock()
    watch = Stopwatch(torch.device("cpu"), clock)
    clock.seconds = 5.0
    watch.exclude(2.0)
    first = watch.lap()
    clock.seconds = 7.5
    watch.exclude(100.0)
    second = watch.lap()
    assert (first(), second(), watch.lap()()) == (3.0, -97.5, 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_lap_on_a_gpu_lasts_until_its_work_is_done() -> None:
    device = torch.device("cuda")
    watch = Stopwatch(device, lambda: 0.0)
    torch.cuda._sleep(100_000_000)
    assert watch.lap()() > 0.01  # the clock of the host stands at 0


def _run_on_a_clock(values: dict[str, Any]) -> int:
    """A run in which update n takes n seconds, and nothing else takes any; its deferred updates."""
    clock, step, defer = _Clock(), trainer.train_step, Trainer._defer
    deferred = []

    def timed(engine: Any, batch: Any, update: int, *rest: Any) -> Any:
        result = step(engine, batch, update, *rest)
        clock.seconds += update
        return result

    def counted(self: Trainer, result: Any) -> None:
        deferred.append(result.update)
        defer(self, result)

    with (
        patch.object(context, "Stopwatch", partial(Stopwatch, clock=clock)),
        patch.object(trainer, "train_step", timed),
        patch.object(Trainer, "_defer", counted),
    ):
        run(values, zero(1))
    return len(deferred)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_log_line_has_the_time_of_its_own_updates(every: int, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = settings(
        folder,
        data,
        train={"updates": 6, "precision": "bf16"},
        log={"every": every, "tensorboard": False},
        evaluation={"every": 0},
        checkpoint={"every": 0},
    )
    assert run_distributed(_run_on_a_clock, 1, values) == [4]  # not the first and not the last
    steps, done, tokens = events(folder, "step"), 0, 0
    assert [e["update"] for e in steps] == sorted({*range(every, 7, every), 6})
    for line in steps:
        seconds = sum(range(done + 1, line["update"] + 1))
        assert line["step_seconds"] == seconds / (line["update"] - done)
        assert line["tokens_per_second"] == (line["tokens"] - tokens) / seconds
        done, tokens = line["update"], line["tokens"]
    assert events(folder, "end")[0]["train_seconds"] == 21.0
