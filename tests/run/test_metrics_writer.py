"""metrics.jsonl stays readable whatever happens to the process that writes it."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

from megalr.data.loader import UpdateBatch, UpdateLoader
from megalr.errors import AgreedError, UserError
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
        writer.write("eval", 2, loss=float("nan"), perplexity=1.0, parameters={"a": 1})
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


def test_a_failure_is_passed_on_once_and_nothing_more_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: list[UserError] = []
    options: dict[str, Any] = {"tensorboard": False, "wandb_project": None, "config": {}}
    with MetricsWriter(tmp_path, True, 10, **options, on_failure=failures.append) as writer:
        writer.write("step", 1, loss=2.5)
        assert writer._file is not None
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
        writer.write("step", 2, loss=2.5)
        writer.write("step", 3, loss=2.5)
    assert len(failures) == 1 and "No space left on device" in str(failures[0])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["update"] == 1
    assert "step 3" not in capsys.readouterr().out


def _error_of_a_run_with_a_full_disk(values: dict[str, Any], full_at: str) -> str:
    """The error on this rank when the disk of metrics.jsonl is full from this event on."""
    write = MetricsWriter.write

    def fill_and_write(self: MetricsWriter, event: str, update: int, **numbers: Any) -> None:
        if self._file is not None and f"{event} {update}" == full_at:
            os.dup2(os.open("/dev/full", os.O_WRONLY), self._file.fileno())
        write(self, event, update, **numbers)

    try:
        with patch.object(MetricsWriter, "write", fill_and_write):
            run(values, zero(1))
    except AgreedError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize("full_at", ["start 0", "step 5", "end 10"])
def test_all_ranks_end_with_one_line_when_rank_0_cannot_write_metrics(
    full_at: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data)
    first, second = run_distributed(_error_of_a_run_with_a_full_disk, 2, values, full_at)
    assert first == second
    expected = f"rank 0: metrics in run.dir {folder} could not be written (No space left on device)"
    assert first.startswith(expected)
    run_distributed(run, 2, values, zero(1))
    assert [event["update"] for event in events(folder, "step")][-1] == 10


class FakeWandb(ModuleType):
    """Weights & Biases as far as it is used: rows of a run are kept across starts by id."""

    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.started: list[dict[str, Any]] = []
        self.axes: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> FakeWandb:
        self.started.append(options)
        self.current = self.rows.setdefault(options["id"], [])
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float], step: int | None = None) -> None:
        assert step is None  # it would drop rows up to the newest step
        self.current.append(row)

    def finish(self) -> None:
        pass


def test_one_wandb_run_has_all_starts_and_all_updates_after_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def start() -> MetricsWriter:
        return MetricsWriter(tmp_path, True, 100, False, "project", {"seed": 1})

    with start() as writer:
        for update in (10, 20, 30):
            writer.write("step", update, loss=1.0, mfu="n/a")
        writer.write("rollback", 30, to_update=10, batches_left_out=2, reason="spike")
        writer.write("step", 20, loss=0.9)
    with start() as writer:  # requeued
        writer.write("eval", 20, loss=0.5, perplexity=1.6)
    (rows,) = fake.rows.values()
    assert [(row["update"], row.get("step/loss")) for row in rows] == [
        (10, 1.0),
        (20, 1.0),
        (30, 1.0),
        (20, 0.9),
        (20, None),
    ]
    assert rows[-1] == {"update": 20, "eval/loss": 0.5, "eval/perplexity": 1.6}
    first, second = fake.started
    assert first == second and first["resume"] == "allow" and first["project"] == "project"
    assert fake.axes[:2] == [("update", None), ("*", "update")]
    (tmp_path / "other").mkdir()
    with MetricsWriter(tmp_path / "other", True, 1, False, "project", {}):
        pass
    assert fake.started[-1]["id"] != first["id"]


def test_wandb_that_is_missing_or_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()

    def refuse(**options: Any) -> None:
        raise fake.Error("api_key not configured\nmore")

    monkeypatch.setattr(fake, "init", refuse)
    for module, message in (
        (None, "wandb is not installed"),
        (fake, r"\(api_key not configured\)"),
    ):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(UserError, match=message):
            MetricsWriter(tmp_path, True, 1, False, "project", {})


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _writer(tmp_path, active=False) as writer:
        writer.write("step", 1, loss=2.5)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_terminal_shows_an_event_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _writer(tmp_path) as writer:
        writer.write("step", 3, loss=2.123456789, tokens=1234)
    assert capsys.readouterr().out == "step  3/10     loss  2.123\n"


def documented() -> dict[str, set[str]]:
    """Fields of each event that docs/metrics.md names."""
    parts = DOCUMENT.read_text(encoding="utf-8").split("\n## ")
    sections = [part for part in parts if part.startswith("`")]
    text = "\n".join(part for part in parts if not part.startswith("`"))
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
    named = documented()
    code = (DOCUMENT.parents[1] / "megalr" / "training").glob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in code)
    # Events of every start, and the one that says where its state comes from.
    written = re.findall(r'metrics\.write\(\s*"(\w+)"', text)
    written += re.findall(r'(?:return \w+,|origin =) \{"(\w+)":', text)
    assert set(written) == named.keys()

    folder = tmp_path / "run"
    values = settings(folder, data)
    values["data"]["validation"] = {"one": str(data), "two": str(data)}
    run_distributed(_run_with_a_slow_loader, 2, values, zero(1))
    for event in ("start", "step", "eval", "eval_further", "checkpoint", "end"):
        fields = events(folder, event)[-1].keys() - {"event", "update", "time"}
        assert fields == named[event], event
    for step in events(folder, "step"):
        assert SLOW_SECONDS <= step["data_seconds"] <= step["step_seconds"]
