"""What a sweep found: the best setting of each group, and whether it lies inside the grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from megalr.files import write_atomic
from megalr.sweep.results import Row

TABLE = "table.md"
Edge = Literal["lowest", "highest"]


@dataclass
class Setting:
    """One combination of axis values, over its seeds.

    Attributes:
        values: label by axis.
        perplexities: of the runs that finished.
        runs: all of its runs.
        bad: those that diverged or failed.
        pending: those that are not done.
    """

    values: dict[str, str]
    perplexities: list[float] = field(default_factory=list)
    runs: int = 0
    bad: int = 0
    pending: int = 0

    @property
    def eligible(self) -> bool:
        """Whether it can be the best: no seed diverged or failed, one has finished."""
        return bool(self.perplexities) and not self.bad

    @property
    def mean(self) -> float:
        """Mean perplexity over the seeds; infinite if it cannot be the best."""
        return mean(self.perplexities) if self.eligible else math.inf

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        return stdev(self.perplexities) if len(self.perplexities) > 1 else None

    @property
    def label(self) -> str:
        """``lr=1e-3, ratio=3``."""
        return ", ".join(f"{axis}={value}" for axis, value in self.values.items()) or "(no axes)"


def groups_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def settings_of(rows: Iterable[Row]) -> list[Setting]:
    """The settings of one group's rows, the best first; equal ones in their order."""
    settings: dict[tuple[tuple[str, str], ...], Setting] = {}
    for row in rows:
        values = {
            column.removeprefix("axis_"): str(value)
            for column, value in row.items()
            if column.startswith("axis_") and value not in (None, "")
        }
        setting = settings.setdefault(tuple(sorted(values.items())), Setting(values))
        setting.runs += 1
        setting.bad += row["status"] in ("failed", "diverged")
        setting.pending += row["status"] == "pending"
        if row["status"] == "finished" and row["perplexity"] not in (None, ""):
            setting.perplexities.append(float(row["perplexity"]))
    return sorted(settings.values(), key=lambda setting: setting.mean)


def numeric_axes(settings: Iterable[Setting]) -> dict[str, list[float]]:
    """Values of the axes that hold numbers only, ascending."""
    labels: dict[str, list[str]] = {}
    for setting in settings:
        for axis, label in setting.values.items():
            labels.setdefault(axis, []).append(label)
    found = {}
    for axis, values in labels.items():
        numbers = [_number(value) for value in values]
        if not any(map(math.isnan, numbers)):
            found[axis] = sorted(set(numbers))
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def edges_of(settings: list[Setting]) -> dict[str, Edge | None]:
    """For every numeric axis of at least two values: at which end the best one lies, or None.

    {} without a setting that can be the best. A value whose runs diverged is part of the grid, so
    the best one beside it lies inside.
    """
    if not settings or not settings[0].eligible:
        return {}
    edges: dict[str, Edge | None] = {}
    for axis, numbers in numeric_axes(settings).items():
        if len(numbers) > 1 and axis in settings[0].values:
            best = float(settings[0].values[axis])
            ends: dict[float, Edge] = {numbers[0]: "lowest", numbers[-1]: "highest"}
            edges[axis] = ends.get(best)
    return edges


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line per group."""
    lines = [
        "| group | best setting | perplexity | seeds | edge of the grid | runs | finished |"
        " diverged | failed | to do |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, own in groups_of(rows).items():
        settings = settings_of(own)
        best = settings[0]
        label, value, seeds = "none yet", "", ""
        if best.eligible:
            label, seeds = best.label, str(len(best.perplexities))
            spread = "" if best.spread is None else f" ± {best.spread:.3f}"
            value = f"{best.mean:.3f}{spread}"
        found = edges_of(settings)
        edges = [f"**{axis}: {edge}**" for axis, edge in found.items() if edge is not None]
        counts = [
            sum(row["status"] == status for row in own)
            for status in ("finished", "diverged", "failed", "pending")
        ]
        where = ", ".join(edges) or ("inside" if found else "")
        cells = [group, label, value, seeds, where, len(own), *counts]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write_table(rows: Iterable[Row], output: Path) -> None:
    """Replace ``table.md``."""
    text = (
        "Perplexity on the (first) validation set after the last update: mean ± standard deviation "
        "over seeds. A setting of which a seed diverged or failed is not the best one. Bold: the "
        "best value lies at an edge of its axis, so a better one may lie beyond.\n\n"
    )
    write_atomic(output / TABLE, (text + table(rows)).encode())
