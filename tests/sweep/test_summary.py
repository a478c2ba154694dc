"""Best settings, edges, further values and second stages, from results made up by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.sweep.figure import draw, panels_of, write_figure
from megalr.sweep.results import Row, write_csv
from megalr.sweep.selection import select
from megalr.sweep.summary import edges_of, settings_of, table
from megalr.sweep.sweep_file import read_sweep_file
from megalr.sweep.widening import continued, read_extensions, widen, write_extensions
from tests.sweep.files import plan, row, write_sweep

LR = ("1e-3", "2e-3", "4e-3")


def bowl(best_lr: float, best_ratio: float = 3, group: str = "g") -> list[Row]:
    """A grid of 3 x 3 whose lowest value is at the given place."""
    rows = []
    for lr in LR:
        for ratio in ("1", "3", "10"):
            away = abs(math.log(float(lr) / best_lr)) + abs(math.log(float(ratio) / best_ratio))
            rows.append(row(group, 20 + 10 * away, lr=lr, ratio=ratio))
    return rows


def test_the_best_setting_is_that_of_the_lowest_mean_over_seeds() -> None:
    rows = [
        *(row("g", p, seed, lr="1e-3") for seed, p in enumerate((30.0, 31.0, 35.0))),
        *(row("g", p, seed, lr="2e-3") for seed, p in enumerate((29.0, 36.0, 34.0))),
        row("g", 10.0, 0, lr="4e-3"),
        row("g", math.nan, 1, "diverged", lr="4e-3"),
        row("g", 5.0, 0, "pending", lr="8e-3"),
    ]
    best, second, *rest = settings_of(rows)
    assert best.values == {"lr": "1e-3"} and best.mean == 32.0
    assert best.spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert second.values == {"lr": "2e-3"} and second.mean == 33.0
    assert not any(setting.eligible for setting in rest)  # a diverged seed, and nothing done
    line = table(rows).splitlines()[-1]
    assert line == "| g | lr=1e-3 | 32.000 ± 2.646 | 3 | **lr: lowest** | 9 | 7 | 1 | 0 | 1 |"


@pytest.mark.parametrize(
    "best, expected",
    [
        ((2e-3, 3), {"lr": None, "ratio": None}),
        ((1e-3, 3), {"lr": "lowest", "ratio": None}),
        ((4e-3, 10), {"lr": "highest", "ratio": "highest"}),
    ],
)
def test_edges_are_named_per_axis(best: tuple[float, float], expected: dict[str, Any]) -> None:
    assert edges_of(settings_of(bowl(*best))) == expected


def test_a_diverged_neighbour_is_the_end_of_the_grid_and_choices_have_no_edge() -> None:
    rows = [row("g", 20, lr="1e-3", r="none"), row("g", 19, lr="2e-3", r="none")]
    rows.append(row("g", math.nan, 1, "diverged", lr="4e-3", r="none"))
    assert edges_of(settings_of(rows)) == {"lr": None}
    assert edges_of(settings_of(rows[:2])) == {"lr": "highest"}


@pytest.mark.parametrize(
    "grid, edge, value",
    [
        ([1e-3, 2e-3, 4e-3], "highest", 8e-3),
        ([1e-3, 2e-3, 4e-3], "lowest", 5e-4),
        ([1, 3, 10], "highest", 33),
        ([1, 3, 10], "lowest", 0.333),
        ([0.5, 1.0], "highest", 2.0),
        ([4, 4], "highest", None),
        ([0, 1], "highest", None),
        ([2, 3, 1.5], "lowest", 1.12),
    ],
)
def test_a_grid_goes_on_with_the_ratio_of_its_last_two_values(
    grid: list[float], edge: Any, value: float | None
) -> None:
    assert continued(grid, edge) == value


def test_every_axis_at_an_edge_gets_a_value_up_to_the_limit(tmp_path: Path) -> None:
    def fine(_: object) -> None:
        return None

    rows = [*bowl(4e-3, 10), *bowl(2e-3, group="inside"), *bowl(1e-3, group="open")]
    rows.append(row("open", 0, 2, "pending", lr="1e-3", ratio="1"))
    first, notes = widen(rows, {}, 2, fine)
    assert first == {"g": {"lr": [8e-3], "ratio": [33]}} and len(notes) == 2
    more = [*rows, row("g", 15, lr="8e-3", ratio="33")]
    second, _ = widen(more, first, 2, fine)
    assert second == {"g": {"lr": [8e-3, 0.016], "ratio": [33, 109]}}
    even_more = [*more, row("g", 14, lr="0.016", ratio="109")]
    assert widen(even_more, second, 2, fine) == (second, [])
    write_extensions(tmp_path, second)
    assert read_extensions(tmp_path) == second

    def no_large_ratio(extensions: dict[str, dict[str, list[float]]]) -> str | None:
        return "optimizer.lr_ratio: too large" if "ratio" in extensions["g"] else None

    found, notes = widen(rows, {}, 2, no_large_ratio)
    assert found == {"g": {"lr": [8e-3]}}
    assert notes[1] == "g: ratio=33 cannot be added: optimizer.lr_ratio: too large"


def test_added_values_are_planned_like_those_of_the_file(tmp_path: Path) -> None:
    axes = {"lr": {"key": "optimizer.lr", "values": [1e-3, 2e-3]}}
    path = write_sweep(tmp_path, groups={"g": {"axes": axes}})
    runs = plan(path, tmp_path, extensions={"g": {"lr": [4e-3]}})
    assert [run.config.optimizer.lr for run in runs] == [1e-3, 2e-3, 4e-3]
    assert runs[-1].name == "g__lr=4e-3__seed=7"


def second_stage(folder: Path, rows: list[Row], **source: Any) -> list[tuple[str, ...]]:
    columns = ["run", "group", "status", "perplexity", "axis_lr", "axis_ratio", "axis_r"]
    write_csv(folder / "runs.csv", columns, rows)
    axes = {
        "lr": {"key": "optimizer.lr"},
        "ratio": {"key": "optimizer.lr_ratio.head"},
        "r": {"choices": {"none": [], "both": ["restarts.every=2"]}},
    }
    groups = {"g": {"axes": {axis: axes[axis] for axis in axes if f"axis_{axis}" in rows[0]}}}
    path = write_sweep(folder, groups=groups, **{"from": {"csv": "runs.csv", **source}})
    selected = select(read_sweep_file(path), [path.parent])
    runs = plan(path, folder / "out", selected=selected)
    return [tuple(point.label for point in run.points.values()) for run in runs]


def test_a_second_stage_runs_the_best_settings_and_their_neighbours(tmp_path: Path) -> None:
    rows = bowl(2e-3)
    assert second_stage(tmp_path, rows, best=1, neighbours=False) == [("2e-3", "3")]
    assert second_stage(tmp_path, rows, best=1) == [
        ("2e-3", "3"),
        ("1e-3", "3"),
        ("4e-3", "3"),
        ("2e-3", "1"),
        ("2e-3", "10"),
    ]
    # The second best is one of these neighbours; beyond the edge its grid goes on.
    best_two = second_stage(tmp_path, rows, best=2)
    assert best_two[:2] == [("2e-3", "3"), ("1e-3", "3")] and ("5e-4", "3") in best_two
    assert len(best_two) == len(set(best_two))
    edge = second_stage(tmp_path, bowl(4e-3), best=1)
    assert ("8e-3", "3") in edge and len(edge) == 5


def test_choices_are_kept_and_have_no_neighbours(tmp_path: Path) -> None:
    rows = [row("g", 20, lr=lr, r=r) for lr in ("1e-3", "2e-3") for r in ("none", "both")]
    rows[3]["perplexity"] = 19
    assert second_stage(tmp_path, rows, best=1) == [
        ("2e-3", "both"),
        ("1e-3", "both"),
        ("4e-3", "both"),
    ]
    rows.append(row("g", 1, lr="1e-3", r="gone"))
    with pytest.raises(UserError, match="axis r has no value gone: add it"):
        second_stage(tmp_path, rows, best=1)


def test_a_second_stage_needs_a_first_one_that_is_done(tmp_path: Path) -> None:
    rows = bowl(2e-3)
    with pytest.raises(UserError, match="1 runs of g are not done"):
        second_stage(tmp_path, [*rows, row("g", 1, 2, "pending", lr="1e-3", ratio="1")])
    with pytest.raises(UserError, match="no setting of group g to choose from; its groups are h"):
        second_stage(tmp_path, [{**r, "group": "h"} for r in rows])
    second_stage(tmp_path, rows)
    path = write_sweep(tmp_path, groups={"g": {}}, **{"from": {"csv": "runs.csv"}})
    with pytest.raises(UserError, match=r"its axes are none, those in .* are lr, ratio"):
        select(read_sweep_file(path), [tmp_path])


def test_the_figure_joins_the_best_of_every_value(tmp_path: Path) -> None:
    rows = [*bowl(2e-3), row("no axes", 3)]
    panels = panels_of(rows)
    assert list(panels) == ["g"] and list(panels["g"]) == ["lr", "ratio"]
    lr = draw(panels).axes[0]
    points, line, best = (list(map(tuple, drawn.get_xydata())) for drawn in lr.lines)
    by_hand = {float(v): min(r["perplexity"] for r in rows if r.get("axis_lr") == v) for v in LR}
    assert line == sorted(by_hand.items()) and best == [(2e-3, 20.0)] and len(points) == 9
    write_figure(rows, tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    write_figure([row("no axes", 3)], tmp_path / "nowhere")  # nothing to draw, nothing written
    assert not (tmp_path / "nowhere").exists()
