"""Which method is best for a budget: by hand on three runs."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from megalr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "study"))

import pareto  # noqa: E402

COLUMNS = ("run", "group", "axis_lr", "seed", "status", "perplexity", "weights_and_states_gib")
RUNS = [
    ("full__lr=1__seed=1", "full", "1", "1", "finished", 50.0, 4.0),
    ("full__lr=1__seed=2", "full", "1", "2", "finished", 54.0, 4.0),
    ("full__lr=2__seed=1", "full", "2", "1", "finished", 60.0, 4.0),
    ("small__lr=1__seed=1", "small", "1", "1", "finished", 56.0, 2.0),
    ("waste__lr=1__seed=1", "waste", "1", "1", "finished", 58.0, 3.0),
    ("bad__lr=1__seed=1", "bad", "1", "1", "diverged", "", 1.0),
]
CURVES = {
    "full__lr=1__seed=1": [(10, 90.0), (20, 70.0), (40, 50.0)],
    "full__lr=1__seed=2": [(10, 94.0), (20, 74.0), (40, 54.0)],
    "full__lr=2__seed=1": [(10, 90.0), (40, 60.0)],
    "small__lr=1__seed=1": [(5, 80.0), (20, 56.0)],
    "waste__lr=1__seed=1": [(30, 100.0), (60, 58.0)],
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, "peak_memory_gib"))
        writer.writerows((*row, 9.0) for row in RUNS)
    with (tmp_path / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "update", "tokens", "seconds", "validation", "loss", "perplexity"))
        for run, curve in CURVES.items():
            for update, (seconds, perplexity) in enumerate(curve):
                writer.writerow((run, update, update, seconds, "c4", 0, perplexity))
                writer.writerow((run, update, update, seconds, "mix", 0, 1.0))
    return tmp_path


def test_the_table_at_equal_time_and_memory(sweep: Path) -> None:
    methods = pareto.methods_of(sweep)
    assert [m.name for m in methods] == ["full", "small", "waste"]
    full = methods[0]
    assert (full.perplexity, full.seeds, full.seconds) == (52.0, 2, 40.0)
    assert full.spread == pytest.approx(8**0.5)
    rows = {row["method"]: row for row in pareto.rows_of(methods, full)}
    assert list(rows) == ["full", "small", "waste"]
    assert [row["at equal seconds"] for row in rows.values()] == ["52.0", "56.0", "86.0"]
    assert [row["seconds to full's"] for row in rows.values()] == ["40", "never", "never"]
    assert [row["on a front"] for row in rows.values()] == [
        "memory and time",
        "memory and time",
        "",
    ]


def test_curves_are_read_between_evaluations() -> None:
    curve = [(10.0, 90.0), (20.0, 70.0), (40.0, 50.0)]
    assert pareto.at_time(curve, 5) is None
    assert pareto.at_time(curve, 15) == 80.0
    assert pareto.at_time(curve, 99) == 50.0
    assert pareto.time_to(curve, 95) == 10.0
    assert pareto.time_to(curve, 60) == 30.0
    assert pareto.time_to(curve, 49) is None


def test_the_program_writes_table_and_figure(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pareto.py", str(sweep), "--reference", "small", "--csv", str(tmp_path / "t.csv")]
    monkeypatch.setattr(sys, "argv", [*words, "--figure", str(tmp_path / "f.svg")])
    pareto.main()
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    # At 20 s: small 56, full 70 and 74, waste not evaluated yet.
    assert [(row["method"], row["at equal seconds"]) for row in rows] == [
        ("small", "56.0"),
        ("full", "72.0"),
        ("waste", ""),
    ]
    assert [row["seconds to small's"] for row in rows] == ["20", "36", "never"]
    assert b"<svg" in (tmp_path / "f.svg").read_bytes()
    assert capsys.readouterr().out.startswith("| method | perplexity |")
    with pytest.raises(UserError, match=r"no runs\.csv and history\.csv"):
        pareto.methods_of(tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", [*words[:3], "lora"])
    with pytest.raises(UserError, match="--reference lora: the groups are full, small, waste"):
        pareto.main()
