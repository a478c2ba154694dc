"""What a sweep shows: a table that replaces itself on a terminal, lines anywhere else."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalr.sweep.live import LiveTable
from megalr.sweep.results import Results
from megalr.sweep.runner import Slot
from tests.sweep.files import row


class Screen(io.StringIO):
    """A terminal that keeps what a reader would see."""

    def isatty(self) -> bool:
        return True

    def seen(self) -> list[str]:
        lines: list[str] = []
        for line in self.getvalue().split("\n"):
            while line.startswith("\033["):
                count, _, line = line.removeprefix("\033[").partition("F\033[J")
                del lines[len(lines) - int(count) :]
            lines.append(line)
        return lines[:-1]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    found = Results("tiny", tmp_path, [])
    rows = [row("a", 30.5, lr="1"), row("a", 20.25, lr="2"), row("a", 9, 1, "failed", lr="3")]
    rows += [row("b", 9, status="pending", lr="1"), row("b", 9, status="pending", lr="2")]
    found.rows = {entry["run"]: entry for entry in rows}
    found.rows["a__lr=3__seed=1"]["error"] = "no luck"
    return found


def test_a_terminal_shows_one_table_below_the_lines_of_ended_runs(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalr.sweep.live.REDRAW_SECONDS", 0.0)
    screen = Screen()
    table = LiveTable(results, 5, 2, screen)
    item: Any = SimpleNamespace(
        started=table.started, slot=Slot("3", 1), run=SimpleNamespace(name="b__lr=1__seed=1")
    )
    for name in list(results.rows)[:3]:
        table.redraw([item])
        table.end_of(results.rows[name])
    table.redraw([item])
    first, second, third, *drawn = screen.seen()
    assert first.startswith("1/5 a__lr=1__seed=1: perplexity 30.500; about")
    assert second.startswith("2/5 a__lr=2__seed=1: perplexity 20.250; about")
    assert third.startswith("3/5 a__lr=3__seed=1: failed (no luck); about")
    counts, running, best = drawn
    assert counts.startswith("2 finished, 0 diverged, 1 failed, 1 running, 1 waiting; about")
    assert running.split() == ["0", "s", "GPU", "3", "b__lr=1__seed=1"]
    assert best == "  best of a: a__lr=2__seed=1: perplexity 20.250"


def test_elsewhere_there_is_a_line_per_ended_run_and_none_for_a_stopped_one(
    results: Results,
) -> None:
    stream = io.StringIO()
    table = LiveTable(results, 2, 1, stream)
    table.redraw([])
    table.end_of(results.rows["b__lr=1__seed=1"])
    assert stream.getvalue() == ""
    table.end_of(results.rows["a__lr=1__seed=1"])
    assert stream.getvalue().startswith("1/2 a__lr=1__seed=1: perplexity 30.500; about")
    assert stream.getvalue().count("\n") == 1
