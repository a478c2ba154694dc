"""metrics.jsonl stays readable whatever happens to the process that writes it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megalr.data.loader import UpdateBatch, UpdateLoader
from megalr.errors import UserError
from megalr.run.metrics_writer import MetricsWriter
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
SLOW_SECONDS = 0.02


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


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"), _writer(tmp_path) as writer:
        assert writer._file is not None
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
        writer.write("step", 1, loss=2.5)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"could not be written \(Is a directory\)"):
        _writer(tmp_path)


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


def _documented() -> dict[str, set[str]]:
    """Fields of each event that docs/metrics.md names."""
    text, *sections = DOCUMENT.read_text(encoding="utf-8").split("\n## ")
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", text, re.MULTILINE)
    fields = {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}
    for section in sections:
        cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        fields[section.split("`")[1]] = {name for cell in cells for name in cell.split("`")[1::2]}
    return fields


def _run_with_a_slow_loader(*arguments: Any) -> None:
    quick = UpdateLoader.__next__

    def slow(self: UpdateLoader) -> UpdateBatch:
        time.sleep(SLOW_SECONDS)
        return quick(self)

    with patch.object(UpdateLoader, "__next__", slow):
        run(*arguments)


def test_every_event_is_documented_with_its_fields_and_waiting_for_data_is_reported(
    data: Path, tmp_path: Path
) -> None:
    documented = _documented()
    code = (DOCUMENT.parents[1] / "megalr" / "training").glob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in code)
    assert set(re.findall(r'metrics\.write\(\s*"(\w+)"', text)) == documented.keys()

    folder = tmp_path / "run"
    run_distributed(_run_with_a_slow_loader, 2, settings(folder, data), zero(1))
    for event in ("start", "step", "eval", "checkpoint", "end"):
        fields = events(folder, event)[-1].keys() - {"event", "update", "time"}
        assert fields == documented[event], event
    for step in events(folder, "step"):
        assert SLOW_SECONDS <= step["data_seconds"] <= step["step_seconds"]
