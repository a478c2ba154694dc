"""Further values for an axis whose best value lies at an edge of its grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from megalr.errors import UserError
from megalr.files import read_json_object, write_atomic
from megalr.sweep.results import Row
from megalr.sweep.summary import Edge, edges_of, groups_of, numeric_axes, settings_of

EXTENSIONS = "extensions.json"
Extensions = dict[str, dict[str, list[float]]]
"""Values that were added, by group and axis, in the order in which they were added."""


def read_extensions(output: Path) -> Extensions:
    """The values that earlier calls have added; {} without any.

    Raises:
        UserError: the file is damaged.
    """
    path = output / EXTENSIONS
    if not path.exists():
        return {}
    found = read_json_object(path)
    for axes in found.values():
        if not isinstance(axes, dict) or not all(map(_is_list_of_numbers, axes.values())):
            raise UserError(f"{path}: must hold lists of numbers by group and axis: remove it")
    return found


def _is_list_of_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def write_extensions(output: Path, extensions: Extensions) -> None:
    """Record them in the sweep's folder."""
    write_atomic(output / EXTENSIONS, (json.dumps(extensions, indent=1) + "\n").encode())


def continued(numbers: Sequence[float], edge: Edge) -> float | None:
    """The next value beyond one end of a grid, with the ratio of the last two.

    1e-3, 2e-3, 4e-3 go on with 8e-3 or 5e-4. Rounded to three digits; an integer if all of the grid
    are. None where there is no ratio: one value, values that are not positive, or an integer that
    rounding returns to the grid.
    """
    grid = sorted(set(numbers), reverse=edge == "lowest")
    if len(grid) < 2 or min(grid) <= 0:
        return None
    value = float(f"{grid[-1] * (grid[-1] / grid[-2]):.3g}")
    if all(float(number).is_integer() for number in grid) and edge == "highest":
        value = round(value)
    return None if value in grid or value <= 0 else value


def extension_of(
    rows: Iterable[Row],
    extensions: Extensions,
    limit: int,
    exhausted: Collection[tuple[str, str]],
) -> tuple[str, str, float] | None:
    """Group, axis and value that the results so far ask for; None if none is left to add.

    A group counts when all of its runs are done, an axis while fewer than ``limit`` values were
    added to it and it is not ``exhausted``.
    """
    for group, own in groups_of(rows).items():
        if any(row["status"] == "pending" for row in own):
            continue
        settings = settings_of(own)
        grids = numeric_axes(settings)
        for axis, edge in edges_of(settings).items():
            added = extensions.get(group, {}).get(axis, [])
            if edge is None or len(added) >= limit or (group, axis) in exhausted:
                continue
            value = continued(grids[axis], edge)
            if value is not None:
                return group, axis, value
    return None


def widen(
    rows: Iterable[Row],
    extensions: Extensions,
    limit: int,
    is_valid: Callable[[Extensions], str | None],
) -> tuple[Extensions, list[str]]:
    """Add one value to every axis that asks for it.

    Args:
        rows: results of the planned runs.
        extensions: what was added before.
        limit: values that may be added to one axis, those before included.
        is_valid: None if all runs with these extensions can be planned, else the reason.

    Returns:
        The extensions, equal to those before if nothing is left to add; a line per axis.
    """
    rows, notes = list(rows), []
    done: set[tuple[str, str]] = set()
    while (found := extension_of(rows, extensions, limit, done)) is not None:
        group, axis, value = found
        done.add((group, axis))
        trial = _with(extensions, group, axis, value)
        reason = is_valid(trial)
        if reason is None:
            extensions = trial
            notes.append(f"{group}: the best {axis} lies at the edge: {axis}={value:g} is added")
        else:
            notes.append(f"{group}: {axis}={value:g} cannot be added: {reason.splitlines()[-1]}")
    return extensions, notes


def _with(
    extensions: Mapping[str, Mapping[str, Sequence[float]]], group: str, axis: str, value: float
) -> Extensions:
    copy = {g: {a: list(values) for a, values in axes.items()} for g, axes in extensions.items()}
    copy.setdefault(group, {}).setdefault(axis, []).append(value)
    return copy
