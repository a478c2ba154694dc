"""Curves, clocks, marks and the ranking hold what was logged; thinning keeps the peaks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalr.report.curves import CHARTS, clock_of, curve_of, drawn_charts, spectra_of, thinned
from megalr.report.marks import Mark, marks_of, some_of_each_kind
from megalr.report.ranking import best_values, finding, ranked
from megalr.run.metrics_reader import Run, read_run
from tests.report.runs import make_long_run, make_run

CHART = {chart.name: chart for chart in CHARTS}


def _run(*events: dict[str, Any]) -> Run:
    return Run("x", Path("x"), {}, events)


@pytest.mark.parametrize("most", [4, 100, 1001])
def test_thinned_curves_keep_the_ends_and_every_peak(most: int) -> None:
    values = np.sin(np.arange(100_003) / 500.0)
    peaks = [7, 50_000, 99_990]
    values[peaks] = [9.0, -9.0, 8.0]
    kept = thinned(values, most)
    assert len(kept) <= most and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == 100_002
    assert {7, 50_000} <= set(kept.tolist()) and (most < 100 or 99_990 in kept)
    # Within one range of the thinning the smallest and the largest value are those of all points.
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    for start, stop in pairwise(edges):
        inside = values[kept[(kept >= start) & (kept < stop)]]
        assert inside.min() == values[start:stop].min()
        assert inside.max() == values[start:stop].max()


def test_short_curves_are_not_thinned() -> None:
    assert thinned(np.array([3.0, 1.0, 2.0]), 4).tolist() == [0, 1, 2]
    assert thinned(np.array([]), 4).tolist() == []


def test_a_curve_holds_the_finite_points_of_its_events() -> None:
    run = _run(
        {"event": "step", "update": 1, "loss": float("nan"), "gradient_norm": "high"},
        {"event": "step", "update": 2, "loss": 5.0, "gradient_norm": 10**400},
        {"event": "step", "update": 3, "loss": 4, "gradient_norm": True},
        {"event": "step", "update": 4, "gradient_norm": 0.5},
    )
    loss, norm = curve_of(run, CHART["loss"]), curve_of(run, CHART["gradient_norm"])
    assert (loss.updates.tolist(), loss.values.tolist()) == ([2, 3], [5.0, 4.0])
    assert (norm.updates.tolist(), norm.values.tolist(), norm.logged) == ([4], [0.5], 1)


def test_hours_are_those_of_running_without_the_pause_between_two_starts(tmp_path: Path) -> None:
    clock = clock_of(read_run(make_long_run(tmp_path / "a", updates=400)))
    assert clock.tokens is not None and clock.hours is not None
    at = dict(zip(clock.updates.tolist(), clock.hours.tolist(), strict=True))
    assert at[0] == pytest.approx(0.1)  # start-up
    assert at[100] == pytest.approx(0.1 + 1.0)
    assert at[204] == pytest.approx(0.1 + 2.0 + 0.1 + 0.04)
    assert at[392] == pytest.approx(0.1 + 3.92 + 0.1)
    assert clock.tokens.tolist() == [512.0 * update for update in clock.updates]
    assert clock.updates[-1] == 392  # 396 and 400 were rolled back over


def test_hours_count_work_that_was_lost() -> None:
    hour = 3600.0
    step = {"event": "step", "loss": 1.0}
    run = _run(
        {"event": "start", "update": 0, "time": 0.0},
        {**step, "update": 10, "time": hour},
        {**step, "update": 20, "time": 2 * hour},  # killed; ten hours later:
        {"event": "start", "update": 10, "time": 12 * hour, "startup_seconds": hour / 2},
        {**step, "update": 20, "time": 13 * hour},
        {"event": "rollback", "update": 20, "to_update": 10, "time": 13 * hour},
        {**step, "update": 20, "time": 14 * hour},
    )
    clock = clock_of(run)
    assert clock.hours is not None
    assert clock.tokens is None
    hours = dict(zip(clock.updates.tolist(), clock.hours.tolist(), strict=True))
    assert hours == pytest.approx({0: 0, 10: 1, 20: 4.5})


def test_old_metrics_have_no_hours_and_no_spectra(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a"))
    clock = clock_of(run)
    assert clock.hours is None and clock.tokens is not None
    assert spectra_of(run, 100) == {}
    drawn, missing = drawn_charts([run])
    assert [chart.name for chart in drawn] == ["loss", "perplexity", "tokens_per_second"]
    assert {"imbalance", "effective_rank"} <= {chart.name for chart in missing}


def test_spectra_balance_and_effective_rank_over_time(tmp_path: Path) -> None:
    run = read_run(make_long_run(tmp_path / "a", updates=400))
    spectra = spectra_of(run, 100)
    assert list(spectra) == ["q", "down"]
    assert spectra["q"]["update"] == [100, 200, 300]  # 400 was rolled back over
    assert spectra["q"]["quantiles"][1] == [0.0, *(200 * level for level in range(1, 7))]
    assert spectra_of(run, 2)["down"]["update"] == [100, 300]
    imbalance = curve_of(run, CHART["imbalance"])
    assert imbalance.values.tolist() == [1 / 100, 1 / 200, 1 / 300]
    assert curve_of(run, CHART["effective_rank"]).values.tolist() == [0.5, 0.5, 0.5]


def test_further_validation_sets_have_a_chart_each() -> None:
    further = {"event": "eval_further", "update": 10, "loss": 1.0}
    run = _run(
        {"event": "step", "update": 10, "loss": 4.0},
        {"event": "eval", "update": 10, "loss": 4.0, "perplexity": 54.6},
        {**further, "validation": "mix <i>", "perplexity": 7.0},
        {**further, "validation": "code", "perplexity": 3.0},
        {**further, "validation": ["c4"], "perplexity": 3.0},
        {**further, "update": 20, "validation": "code", "perplexity": 2.0},
    )
    charts = {chart.title: chart for chart in drawn_charts([run])[0]}
    assert list(charts) == [
        *("Training loss", "Validation perplexity", "Perplexity, mix <i>", "Perplexity, code")
    ]
    found = {title: curve_of(run, chart).values.tolist() for title, chart in charts.items()}
    assert found["Perplexity, mix <i>"] == [7.0] and found["Perplexity, code"] == [3.0, 2.0]
    assert [chart.name for chart in charts.values()] == [
        *("loss", "perplexity", "perplexity_2", "perplexity_3")
    ]


def test_events_are_marked_unless_they_are_measurements() -> None:
    run = _run(
        {"event": "start", "update": 0, "time": 0},
        {"event": "step", "update": 5, "loss": 1.0},
        {"event": "skip", "update": 6, "reason": "spike", "time": 86400.0, "batch": 5},
        {"event": "restart", "update": 7, "trigger": "period", "matrices": 14, "reset": True},
        {
            "event": "fork",
            "update": 8,
            "path": "runs/a/checkpoints/update_8",
            "changed": [["x"] * 99],
        },
        {"event": "moved", "update": 8, "of": "runs/a", "note": "x" * 500, "spectra": {}},
        {"event": "end", "update": 8, "reason": "SIGTERM"},
        {"event": "start", "update": 0},
    )
    assert marks_of(run) == [
        Mark("skip", 6, "1970-01-02 00:00:00", "reason: spike; batch: 5"),
        Mark("restart", 7, "", "trigger: period; reset: true"),
        Mark("fork", 8, "", "path: runs/a/checkpoints/update_8"),
        Mark("moved", 8, "", "of: runs/a"),
        Mark("begun again", 0, "", "no checkpoint to resume from"),
    ]


@pytest.mark.parametrize(("total", "most"), [(5, 5), (7, 3), (1000, 20), (1001, 999), (3, 1)])
def test_of_many_events_of_a_kind_some_are_kept_evenly(total: int, most: int) -> None:
    marks = [Mark("restart", place, "", "") for place in range(total)]
    rare = Mark("rollback", 1, "", "")
    kept = some_of_each_kind([*marks, rare], most)
    assert kept[-1] == rare
    updates = [mark.update for mark in kept[:-1]]
    assert len(updates) == min(total, most)
    steps = set(np.diff(updates).tolist())
    assert steps <= {total // most, total // most + 1} or total <= most


def test_ranking_is_by_the_lowest_perplexity_and_unevaluated_runs_come_last(
    tmp_path: Path,
) -> None:
    worse = read_run(make_long_run(tmp_path / "worse", level=3.0, lr=2e-3))
    better = read_run(make_long_run(tmp_path / "better", level=2.0))
    start = {"event": "start", "update": 0, "method": "low_rank"}
    new = Run("new", Path("/new"), {}, (start, {"event": "step", "update": 4, "loss": 9.0}))
    rows = ranked([new, worse, better])
    assert [row.label for row, _ in rows] == ["better", "worse", "new"]
    first = rows[0][0]
    lowest = 2.7 ** (2.0 + 4.0 / 360)  # at 360, since 400 was rolled back over
    assert first.perplexity == first.last_perplexity == pytest.approx(lowest)
    assert (first.at_update, first.updates, first.tokens) == (360, 392, 512 * 392)
    assert (first.method, first.rank, first.optimizer, first.lr) == ("low_rank", 8, "adamw", 1e-3)
    assert (first.tokens_per_second, first.memory_gib) == (5000.0, 1.5)
    assert first.hours == pytest.approx(0.1 + 4.0 + 0.1)
    assert best_values([row for row, _ in rows]) == {
        "perplexity": first.perplexity,
        "last_perplexity": first.perplexity,
    }


def test_the_finding_names_the_best_run_its_lead_and_what_differs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, rank) for name, rank in (("a", 8), ("b", 16))]
    runs = [read_run(folder) for folder in folders]
    runs[1].series("eval")[-1]["perplexity"] = 30.0
    lines = finding(ranked(runs))
    assert lines[0] == (
        "Best is b with a validation perplexity of 30 after 30 updates; next a with 33.33 (+11.1%)."
    )
    assert lines[1:] == ["The 2 runs differ in method.rank."]
    other = read_run(make_run(tmp_path / "c", 8, changes={"data.validation": "other"}))
    assert finding(ranked([runs[0], other]))[2] == (
        "Their perplexities may not be comparable: data.validation differs."
    )
    assert finding(ranked(runs[:1])) == [
        "a reached a validation perplexity of 33.33 after 30 updates, from 100 after 10."
    ]
    nothing = _run({"event": "step", "update": 1, "loss": 2.0})
    assert finding(ranked([nothing])) == ["No run has been evaluated yet."]
    same = read_run(make_run(tmp_path / "d" / "a", 8))
    assert finding(ranked([runs[0], same]))[1] == "The 2 runs have the same settings."
