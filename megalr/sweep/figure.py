"""The figure of a sweep: perplexity over every numeric axis, a row of panels per group."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.files import write_atomic
from megalr.sweep.results import Row
from megalr.sweep.summary import Setting, groups_of, numeric_axes, settings_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE = "figure.png"


def panels_of(rows: Iterable[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By group and numeric axis of at least two values: (value, mean perplexity) of every setting
    that can be the best."""
    panels = {}
    for group, own in groups_of(rows).items():
        settings = [setting for setting in settings_of(own) if setting.eligible]
        axes = [axis for axis, values in numeric_axes(settings).items() if len(values) > 1]
        if axes:
            panels[group] = {axis: _points(settings, axis) for axis in axes}
    return panels


def _points(settings: list[Setting], axis: str) -> list[tuple[float, float]]:
    return [(float(s.values[axis]), s.mean) for s in settings if axis in s.values]


def draw(panels: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    """A row per group, a column per axis; the line joins the best of each value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, panels.values()))
    size = (4.2 * columns, 3.0 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for (group, axes), row in zip(panels.items(), grid, strict=True):
        for axis, place in zip(axes, row, strict=False):
            _panel(place, axes[axis])
            place.set_xlabel(axis)
            place.set_title(group, fontsize=10)
        row[0].set_ylabel("perplexity")
        for place in row[len(axes) :]:
            place.remove()
    return figure


def _panel(place: Axes, points: list[tuple[float, float]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    best: dict[float, float] = {}
    for x, y in points:
        best[x] = min(y, best.get(x, math.inf))
    line = sorted(best.items())
    place.plot(*zip(*points, strict=True), "o", color="C0", alpha=0.35, markersize=4)
    place.plot(*zip(*line, strict=True), "-", color="C0")
    lowest = min(line, key=lambda point: point[1])
    place.plot(*lowest, "o", color="C3")
    if line[0][0] > 0:
        place.set_xscale("log")
        place.set_xticks([x for x, _ in line], [f"{x:g}" for x, _ in line], fontsize=8)
        place.xaxis.set_minor_formatter(NullFormatter())
    place.set_yscale("log")
    for formatter in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    # A setting far above the line would hide the line's shape.
    bottom, top = lowest[1], max(y for _, y in line)
    room = max(top / bottom, 1.01) ** 0.1
    place.set_ylim(bottom / room, top * room)
    place.grid(alpha=0.3)


def write_figure(rows: Iterable[Row], output: Path) -> None:
    """Replace ``figure.png``; none is made while no group has two values of a numeric axis."""
    panels = panels_of(rows)
    if not panels:
        return
    buffer = io.BytesIO()
    draw(panels).savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(output / FIGURE, buffer.getvalue())
