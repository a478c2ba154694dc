"""The best settings of an earlier sweep and their neighbours, for a second one to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalr.errors import UserError
from megalr.sweep.grid import number_label
from megalr.sweep.results import read_csv
from megalr.sweep.summary import Edge, Setting, groups_of, numeric_axes, settings_of
from megalr.sweep.sweep_file import FromSection, SweepFile, find_path
from megalr.sweep.widening import continued

Labels = dict[str, str]
"""A setting: label by axis."""


def select(sweep: SweepFile, folders: Sequence[Path]) -> dict[str, list[Labels]] | None:
    """The settings of every group of a sweep with ``from``; None for one without.

    Args:
        sweep: the file's content.
        folders: where a relative path of the CSV starts from.

    Raises:
        UserError: the table is missing, lacks a group, has other axes, or its runs are not done.
    """
    if sweep.source is None:
        return None
    path = find_path(sweep.source.csv, folders)
    groups = groups_of(read_csv(path))
    selected = {}
    for name, group in sweep.groups.items():
        rows = groups.get(name, [])
        pending = sum(row["status"] == "pending" for row in rows)
        if pending:
            raise UserError(f"{path}: {pending} runs of {name} are not done: finish that sweep")
        settings = [setting for setting in settings_of(rows) if setting.eligible]
        if not settings:
            raise UserError(
                f"{path}: no setting of group {name} to choose from; its groups are "
                f"{', '.join(groups) or 'none'}"
            )
        axes = set(settings[0].values)
        if axes != set(group.axes):
            raise UserError(
                f"groups.{name}: its axes are {_listed(set(group.axes))}, those in {path} are "
                f"{_listed(axes)}: give the same"
            )
        selected[name] = best_and_neighbours(settings_of(rows), sweep.source)
    return selected


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def best_and_neighbours(settings: list[Setting], wanted: FromSection) -> list[Labels]:
    """The best settings, then their neighbours: one step along one numeric axis, either way.

    A step beyond the grid continues it with the ratio of its last two values.
    """
    chosen = [s.values for s in settings if s.eligible][: wanted.best]
    grids = numeric_axes(settings) if wanted.neighbours else {}
    near = [
        {**values, axis: number_label(number)}
        for values in chosen
        for axis, grid in grids.items()
        for number in _beside(grid, float(values[axis]))
    ]
    unique = {tuple(sorted(labels.items())): labels for labels in (*chosen, *near)}
    return list(unique.values())


def _beside(grid: list[float], value: float) -> list[float]:
    """The values below and above one of a grid, as far as there are any."""
    at = grid.index(value)
    ends: tuple[Edge, Edge] = ("lowest", "highest")
    below = grid[at - 1] if at > 0 else continued(grid, ends[0])
    above = grid[at + 1] if at + 1 < len(grid) else continued(grid, ends[1])
    return [number for number in (below, above) if number is not None]
