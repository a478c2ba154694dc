"""The page: one HTML file with everything in it, and nothing that it loads from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megalr.errors import UserError
from megalr.files import disk_errors, replace_file
from megalr.report.collect import Collected
from megalr.report.curves import (
    Chart,
    clock_of,
    curve_of,
    drawn_charts,
    points_per_curve,
    spectra_of,
)
from megalr.report.marks import MARKS_OF_A_KIND, marks_of, some_of_each_kind
from megalr.report.ranking import Rows, ranked
from megalr.report.sections import (
    chart_figures,
    control_bar,
    events_section,
    page_head,
    problems_section,
    ranking_section,
    settings_section,
)

SHOWN_AT_FIRST = 10
"""Runs whose curves are drawn when the page opens: the best."""
RESTARTS_OF_SPECTRA = 4000
"""Shared by the runs, down to 20 each, up to 400."""

# Nothing may be loaded: not from the network, not from other files.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def write_page(collected: Collected, output: Path) -> None:
    """Write the report on some runs as one HTML file; it replaces an old one when it is whole.

    Raises:
        UserError: plotly is not installed; the file cannot be written.
    """
    content = page_of(collected).encode("utf-8", errors="replace")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, content)


def page_of(collected: Collected) -> str:
    """The page as text.

    Raises:
        UserError: plotly is not installed.
    """
    library = plotly_script()
    rows = ranked(collected.runs)
    runs = [run for _, run in rows]
    drawn, missing = drawn_charts(runs)
    data = data_of(rows, drawn)
    has_spectra = any(run["spectra"] for run in data["runs"])
    sections = [
        page_head(rows),
        control_bar(data["runs"], data["most"], SHOWN_AT_FIRST),
        chart_figures(drawn, missing, has_spectra),
        ranking_section(rows),
        events_section(rows),
        settings_section(rows),
        problems_section(collected),
    ]
    title = rows[0][0].label if len(rows) == 1 else f"{len(rows)} runs"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}: megalr report</title>",
            f"<style>{_asset('page.css')}</style>\n</head>\n<body>",
            *filter(None, sections),
            f'<script type="application/json" id="data">{_json_in_html(data)}</script>',
            f"<script>{library}</script>",
            f"<script>{_asset('page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def plotly_script() -> str:
    """plotly.js as text, its licence in the first lines.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            f"the report needs plotly, which cannot be imported ({error}): "
            "pip install 'megalr[report]', or give --output NAME.png"
        ) from error
    return get_plotlyjs().replace("</script", "<\\/script")


def data_of(rows: Rows, charts: Sequence[Chart]) -> dict[str, Any]:
    """What the page's program draws from: charts, and of each run curves, clock, marks, spectra."""
    most = points_per_curve(len(rows))
    restarts = min(400, max(20, RESTARTS_OF_SPECTRA // max(1, len(rows))))
    runs = []
    for row, run in rows:
        curves = {chart.name: curve_of(run, chart, most) for chart in charts}
        clock = clock_of(run)
        marks = some_of_each_kind(marks_of(run), MARKS_OF_A_KIND)
        runs.append(
            {
                "label": row.label,
                "curves": {
                    name: {"x": curve.updates.tolist(), "y": _rounded(curve.values)}
                    for name, curve in curves.items()
                },
                "logged": max((curve.logged for curve in curves.values()), default=0),
                "clock": {
                    "update": clock.updates.tolist(),
                    "tokens": None if clock.tokens is None else _rounded(clock.tokens, 9),
                    "hours": None if clock.hours is None else _rounded(clock.hours),
                },
                "marks": [[mark.kind, mark.update, mark.details] for mark in marks],
                "spectra": spectra_of(run, restarts),
            }
        )
    described = [
        {"name": chart.name, "smooth": chart.smooth, "sparse": chart.event != "step"}
        for chart in charts
    ]
    return {"charts": described, "runs": runs, "shown": SHOWN_AT_FIRST, "most": most}


def _rounded(values: Iterable[float], digits: int = 6) -> list[float]:
    """Significant digits that a drawing can show; a full float64 would triple the page."""
    return [float(f"{value:.{digits}g}") for value in values]


def _json_in_html(value: Any) -> str:
    """JSON for a script element, which nothing in it can close."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (resources.files("megalr.report") / "assets" / name).read_text(encoding="utf-8")
