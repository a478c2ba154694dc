"""The study: its files are valid sweeps, and its pages say what the list of runs says."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from megalr.sweep.grid import plan_runs
from megalr.sweep.sweep_file import read_sweep_file

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "benchmarks" / "study"
SWEEPS = sorted(path for path in STUDY.glob("*.yaml") if path.name != "base.yaml")
LARGE = ("table3_20m", "table3_60m", "orthogonal_20m")
"""Hundreds of runs, of which each configuration is checked."""

sys.path.insert(0, str(STUDY))

import collect  # noqa: E402
import seeds  # noqa: E402
import tables  # noqa: E402


def _list() -> list[dict[str, str]]:
    with collect.LIST.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.long if p.stem in LARGE else []) for p in SWEEPS],
    ids=lambda path: path.stem,
)
def test_every_sweep_file_gives_valid_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert plan_runs(read_sweep_file(path), [ROOT], tmp_path)


def test_the_page_has_the_table_of_the_list() -> None:
    page = (ROOT / "benchmarks" / "lab" / "study.md").read_text(encoding="utf-8")
    quoted = page.split("<!-- table3_20m: begin -->\n")[1].split("\n<!-- table3_20m: end -->")[0]
    assert tables.table(tables.methods_of(_list(), "20M")) == quoted


def test_findings_quote_the_best_runs() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, rows in tables.methods_of(_list(), "20M").items():
        (line,) = [text for text in page.splitlines() if text.startswith(f"| {name} | ")][:1]
        best, shared = tables.best_of(rows), tables.best_of(rows, tables.shares_one_rate)
        assert best is not None
        numbers = [cell.strip() for cell in line.split("|")[2:4]]
        published = f"{float(shared['perplexity_c4']):.1f}" if shared else ""
        assert numbers == [published, f"{float(best['perplexity_c4']):.1f}"]


def test_of_a_run_made_again_the_list_keeps_the_new_one() -> None:
    old = [{"study": "a", "lr": "4e-3", "seed": "1"}, {"study": "a", "lr": "1e-3", "seed": "1"}]
    new = [{"study": "a", "lr": "0.004", "seed": 1, "perplexity_c4": "9"}]
    assert collect.merge(old, new) == [new[0], old[1]]


def test_the_end_of_an_axis_is_named() -> None:
    rows = [{"lr": lr, "alpha": "8"} for lr in ("1e-3", "2e-3", "4e-3")]
    rows = [{**row, "lr_ratio_embedding": "", "adam_lr_ratio": ""} for row in rows]
    assert tables.at_edge(rows, rows[2]) == ["lr"]
    assert tables.at_edge(rows, rows[1]) == []


def test_means_over_seeds_leave_out_what_did_not_finish() -> None:
    def row(lr: str, seed: int, c4: str, status: str = "finished") -> dict[str, str]:
        return {"group": "g", "lr": lr, "seed": str(seed), "perplexity_c4": c4, "status": status}

    rows = [row("2e-3", 1, "20"), row("1e-3", 1, "10"), row("1e-3", 2, "13"), row("1e-3", 3, "16")]
    rows.append(row("2e-3", 2, "", "diverged"))
    assert seeds.table(rows).splitlines() == [
        "| lr | C4 | runs | not finished |",
        "| --- | --- | --- | --- |",
        "| 1e-3 | 13.0 ± 3.0 | 3 | 0 |",
        "| 2e-3 | 20.0 | 2 | 1 |",
    ]
