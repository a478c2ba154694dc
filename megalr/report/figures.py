"""Curves of runs as PNG and SVG, through matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalr.errors import UserError
from megalr.files import disk_errors, replace_file
from megalr.report.curves import CHARTS, OVERVIEW, Chart, curve_of, drawn_charts
from megalr.report.ranking import Rows, ranked
from megalr.run.metrics_reader import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
MOST_RESTARTS = 50
"""Restarts that are marked by lines; more would hide the curve."""
MOST_IN_A_LEGEND = 20


def draw_overview(runs: Sequence[Run]) -> Figure:
    """Training loss and validation perplexity side by side, a curve per run, restarts marked."""
    return _drawn(ranked(runs), CHARTS[:OVERVIEW])


def write_overview(runs: Sequence[Run], output: Path) -> None:
    """Write :func:`draw_overview` as the format that the file's name ends in.

    Raises:
        UserError: matplotlib is not installed; the file cannot be written.
    """
    _save(draw_overview(runs), output)


def write_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write every chart that some run has points of as ``folder/NAME.png`` and ``NAME.svg``.

    Raises:
        UserError: matplotlib is not installed; a file cannot be written.
    """
    rows = ranked(runs)
    written = []
    for chart in drawn_charts(runs)[0]:
        figure = _drawn(rows, [chart])
        for ending in FORMATS:
            written.append(folder / f"{chart.name}.{ending}")
            _save(figure, written[-1])
    return written


def _drawn(rows: Rows, charts: Sequence[Chart]) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"figures need matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    figure = Figure(figsize=(5.5 * len(charts) + 1, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw_chart(axis, rows, chart)
    return figure


def _draw_chart(axis: Axes, rows: Rows, chart: Chart) -> None:
    from matplotlib.ticker import LogFormatter

    for number, (row, run) in enumerate(rows):
        curve = curve_of(run, chart)
        dash = ("-", "--", ":", "-.")[number // 10 % 4]
        if len(curve.updates):
            marker = "." if len(curve.updates) == 1 else ""
            axis.plot(
                curve.updates,
                curve.values,
                marker=marker,
                linestyle=dash,
                label=_literal(row.label),
                color=f"C{number % 10}",
                zorder=3 - number / len(rows),  # the best lies on top
            )
        if chart.name == "loss":
            _mark_restarts(axis, run, f"C{number % 10}")
    axis.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, fontsize=11)
    axis.set_xlabel("updates")
    if chart.log and any(
        value > 0 for line in axis.lines for value in np.asarray(line.get_ydata())
    ):
        axis.set_yscale("log")
        for ticks in ("major", "minor"):  # 200 instead of 2 x 10^2
            formatter = LogFormatter(minor_thresholds=(2, 0.5))
            getattr(axis.yaxis, f"set_{ticks}_formatter")(formatter)
    axis.grid(alpha=0.3)
    named = axis.get_legend_handles_labels()[0]
    if 1 < len(named) <= MOST_IN_A_LEGEND:
        axis.legend(fontsize=8)


def _literal(label: str) -> str:
    """A run's name as matplotlib shows it unchanged: no formula, not hidden by a first ``_``."""
    text = label.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _mark_restarts(axis: Axes, run: Run, colour: str) -> None:
    restarts = run.series("restart")
    if len(restarts) <= MOST_RESTARTS:
        for restart in restarts:
            axis.axvline(restart["update"], color=colour, alpha=0.2, linewidth=0.8)


def _save(figure: Figure, output: Path) -> None:
    import matplotlib

    buffer = io.BytesIO()
    ending = output.suffix.removeprefix(".")
    # No names, dates and random identifiers: the same runs give the same file.
    metadata = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "megalr"}):
        figure.savefig(buffer, format=ending, dpi=110, metadata=metadata)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, buffer.getvalue())
