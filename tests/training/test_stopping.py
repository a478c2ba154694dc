"""Signals and stop files: one agreed stop, a checkpoint, exit code 75, and an exact resume."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalr.distributed.signals import STOPPED
from megalr.distributed.watchdog import STALLED
from tests.ranks import run_distributed
from tests.training.runs import events, settings, zero
from tests.training.stops import hang_in_update_3, run_until_signal, signal_at_first_sight
from tests.warm import start_ranks

pytestmark = pytest.mark.long

SEEN = ("update", "loss", "gradient_norm", "learning_rate", "tokens", "perplexity")


def _values(folder: Path, data: Path, **sections: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "train": {"global_batch_size": 8, "precision": "bf16"},
        "checkpoint": {"every": 4},
        "restarts": {"every": 3},
    }
    return settings(folder, data, **{**options, **sections})


def _common(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [{key: event.get(key) for key in SEEN} for event in events(folder, kind)]


def test_stopped_anywhere_and_resumed_the_run_is_bitwise_the_unbroken_one(
    data: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    run_distributed(run_until_signal, 2, _values(whole, data), zero(1), "never", 0, 0)

    def stop(point: str, rank: int, number: int, update: int = 0) -> list[int]:
        values = _values(folder, data)
        return run_distributed(run_until_signal, 2, values, zero(1), point, rank, number, update)

    both = [STOPPED, STOPPED]
    assert stop("start", 1, signal.SIGTERM) == both
    assert not (folder / "config.yaml").exists()

    assert stop("step", 1, signal.SIGTERM, 1) == both
    (stopped,) = events(folder, "signal")
    assert stopped["signal"] == "SIGTERM" and 1 <= stopped["update"] < 5
    assert [e["update"] for e in events(folder, "checkpoint")][-1] == stopped["update"]
    assert events(folder, "end")[-1]["reason"] == "SIGTERM"

    assert stop("evaluation", 0, signal.SIGUSR1) == both
    assert events(folder, "signal")[-1]["update"] == 5
    assert events(folder, "signal")[-1]["signal"] == "SIGUSR1"
    assert not events(folder, "eval")

    # Before anything else it makes the evaluation that was broken off.
    assert stop("saving", 1, signal.SIGINT) == both
    assert events(folder, "signal")[-1]["update"] == 8
    assert events(folder, "signal")[-1]["signal"] == "SIGINT"
    assert [e["update"] for e in events(folder, "checkpoint")].count(8) == 1

    assert stop("step", 1, 0, 9) == both
    assert events(folder, "signal")[-1]["signal"] == "stop_file"
    assert events(folder, "signal")[-1]["update"] == 9
    assert not (folder / "stop").exists()

    # In the evaluation after the last update: not finished before that is made.
    assert stop("evaluation", 1, signal.SIGTERM) == both
    assert stop("never", 0, 0) == [0, 0]
    assert events(folder, "end")[-1]["reason"] == "finished"
    assert len(events(folder, "end")) == 6
    # The last checkpoint was made again when the evaluation was no longer pending.
    assert [e["update"] for e in events(folder, "checkpoint")].count(10) == 2

    for kind in ("step", "eval"):
        assert _common(folder, kind) == _common(whole, kind)
    assert [e["update"] for e in events(folder, "restart")] == [3, 6, 9]


def test_a_signal_to_one_process_ends_all_with_75_and_a_second_one_does_no_harm(
    data: Path, tmp_path: Path
) -> None:
    values = _values(
        tmp_path / "run",
        data,
        train={"updates": 100_000, "global_batch_size": 8},
        evaluation={"every": 0},
        checkpoint={"every": 0},
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    arguments = ["--config", str(config)]

    job = start_ranks(tmp_path / "early", arguments, hook=signal_at_first_sight)
    assert job.wait() == [STOPPED, STOPPED], job.output()
    assert "stopped during start-up (SIGTERM)" in job.output()
    assert not (tmp_path / "run" / "config.yaml").exists()

    job = start_ranks(tmp_path / "late", arguments)
    _wait_for_steps(tmp_path / "run", 3)
    job.send(1, signal.SIGTERM)
    job.send(1, signal.SIGTERM)
    job.send(0, signal.SIGTERM)
    assert job.wait() == [STOPPED, STOPPED], job.output()
    assert events(tmp_path / "run", "end")[-1]["reason"] == "SIGTERM"
    (saved,) = events(tmp_path / "run", "checkpoint")
    assert saved["update"] == events(tmp_path / "run", "signal")[0]["update"]


def _wait_for_steps(folder: Path, count: int, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(events(folder, "step")) >= count:
            return
        time.sleep(0.1)
    pytest.fail("the run did not begin")


def test_a_run_that_stands_still_leaves_the_stacks_of_all_ranks(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    # Longer than any update of a loaded machine.
    values = _values(tmp_path / "run", data, health={"stall_seconds": 6.0})
    config.write_text(yaml.safe_dump(values))
    job = start_ranks(tmp_path / "out", ["--config", str(config)], hook=hang_in_update_3)
    assert job.wait() == [STALLED, STALLED], job.output()
    # That of update 2 is written when update 3 has been launched.
    assert [e["update"] for e in events(tmp_path / "run", "step")] == [1]
    for rank, place in ((0, "train_update"), (1, "in hang")):
        text = (tmp_path / "run" / "stacks" / f"rank-{rank}.txt").read_text()
        assert f"rank {rank} has made no progress for 6 s" in text and "after update 2" in text
        assert place in text
        assert place in job.outputs[rank].read_text()
