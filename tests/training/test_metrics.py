"""metrics.jsonl stays readable whatever happens to the process that writes it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megalr.training.metrics import MetricsWriter, Stopwatch


def _writer(folder: Path, active: bool = True) -> MetricsWriter:
    return MetricsWriter(folder, active, 10, tensorboard=False, wandb_project=None, config={})


def test_every_line_is_json_and_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with _writer(tmp_path) as writer:
        writer.write("step", 1, loss=2.5, mfu="n/a")
    whole = path.read_text()
    path.write_text(whole + '{"event": "step", "upd')
    with _writer(tmp_path) as writer:
        writer.write("eval", 2, loss=float("nan"), parameters={"a": 1})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["update"]) for line in lines] == [("step", 1), ("eval", 2)]
    assert lines[0]["loss"] == 2.5 and lines[0]["mfu"] == "n/a"
    assert abs(lines[0]["time"] - time.time()) < 60


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _writer(tmp_path, active=False) as writer:
        writer.write("step", 1, loss=2.5)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_console_shows_event_update_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _writer(tmp_path) as writer:
        writer.write("step", 30, loss=2.123456789, tokens=1234)
    assert "step 30: loss 2.1235  tokens 1234" in capsys.readouterr().out


def test_stopwatch_leaves_out_what_is_measured_apart() -> None:
    watch = Stopwatch()
    time.sleep(0.05)
    watch.exclude(0.04)
    first = watch.lap()
    assert 0.005 < first < 5.0
    watch.exclude(100.0)
    assert watch.lap() < -90.0  # the exclusion belongs to the running interval only
    assert watch.lap() >= 0.0
