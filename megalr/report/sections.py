"""The parts of the page as HTML; every text of a run is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from megalr.report.collect import (
    Collected,
    as_text,
    config_differences,
    final_numbers,
)
from megalr.report.curves import Chart
from megalr.report.marks import (
    MOST_ROWS,
    ROWS_OF_A_KIND,
    Mark,
    counts_of,
    marks_of,
    some_of_each_kind,
)
from megalr.report.ranking import COLUMNS, Rows, best_values, cells, finding

RUNS_AS_COLUMNS = 6
"""With more runs, tables of settings have a row per run."""
MOST_CONFIGURATIONS = 20
"""Runs whose whole configuration is on the page."""
LONGEST_IN_A_LINE = 40
"""Characters of a cell that is not broken."""
NUMERIC = int | float

Table = tuple[list[str], list[list[str]]]
"""Headings, and the cells of each row; the first cell of a row heads it."""


def page_head(rows: Rows) -> str:
    """Heading, the finding, and the best run's numbers."""
    best = rows[0][0]
    first, *others = finding(rows)
    tiles = [
        ("perplexity", as_text(best.perplexity)),
        ("tokens/s", as_text(best.tokens_per_second)),
        ("memory", "—" if best.memory_gib is None else f"{as_text(best.memory_gib)} GiB"),
        ("time", duration(best.hours)),
        ("updates", as_text(best.updates)),
        ("ended", best.ended),
    ]
    numbers = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in tiles
    )
    label = "" if len(rows) == 1 else f'<p class="of">{html.escape(best.label)}</p>'
    return (
        '<header><p class="kind">megalr report</p>'
        f"<h1>{html.escape(first)}</h1>"
        + "".join(f"<p>{html.escape(text)}</p>" for text in others)
        + f'{label}<dl class="tiles">{numbers}</dl></header>\n'
        '<p id="problem" role="alert" hidden></p>\n'
        "<noscript><p>The plots need JavaScript; the tables below do not.</p></noscript>"
    )


def duration(hours: float | None) -> str:
    """Hours as text in the unit that suits them."""
    if hours is None:
        return "—"
    if hours < 1 / 30:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def control_bar(runs: Sequence[dict[str, Any]], most: int, shown: int) -> str:
    """What applies to all plots: axis, smoothing, marks, colours; which runs are drawn."""
    options = "".join(
        f'<option value="{value}">{text}</option>'
        for value, text in (("update", "updates"), ("tokens", "tokens"), ("hours", "hours"))
    )
    buttons = ""
    if len(runs) > 1:
        buttons = (
            f'<button type="button" data-show="best">best {min(shown, len(runs))}</button>'
            '<button type="button" data-show="all">all</button>'
            '<button type="button" data-show="none">none</button>'
        )
    thinned = [run for run in runs if run["logged"] > most]
    notes = [
        "Drag to zoom all plots, double-click to reset; on a touch screen use a plot's buttons."
    ]
    if len(runs) > shown:
        notes.append(f"The {shown} best of {len(runs)} runs are drawn at first.")
    if thinned:
        notes.append(
            f"Curves of {len(thinned)} runs are thinned to {most:,} points each, which keep the "
            "smallest and the largest value of every stretch; smoothing acts on these."
        )
    return (
        '<div class="controls" hidden><div class="row">'
        f'<label>axis <select id="axis">{options}</select></label>'
        '<label><input type="checkbox" id="log-axis"> log</label>'
        '<label class="wide">smoothing <input type="range" id="smooth" min="0" max="0.98" '
        'step="0.02" value="0"> <output id="smooth-value">0</output></label>'
        '<label><input type="checkbox" id="marks" checked> events '
        '<span class="unit" id="marks-note"></span></label>'
        '<button type="button" id="theme" title="colours">◐</button>'
        f'</div><div class="row"><div class="chips" id="chips"></div>'
        f'<div class="pick">{buttons}</div></div></div>'
        f'\n<p class="note">{html.escape(" ".join(notes))}</p>'
    )


def chart_figures(drawn: Sequence[Chart], missing: Sequence[Chart], spectra: bool) -> str:
    """A figure for each chart, with its switches; and what the runs have not recorded."""
    figures = [_figure(chart.name, chart.title, chart.unit, chart.log) for chart in drawn]
    if spectra:
        choice = (
            '<label>run <select id="spectrum-run"></select></label>'
            '<label>of <select id="spectrum-kind"></select></label>'
        )
        figures.append(
            _figure(
                "spectrum",
                "Singular values at restarts",
                "quantiles over all layers",
                log=True,
                choice=choice,
            )
        )
    absent = [chart.title.lower() for chart in missing]
    absent += [] if spectra else ["singular values"]
    note = ""
    if absent:
        note = f'<p class="note">Not recorded by these runs: {", ".join(absent)}.</p>'
    return f'<main class="charts">{"".join(figures)}</main>{note}'


def _figure(name: str, title: str, unit: str, log: bool, choice: str = "") -> str:
    checked = " checked" if log else ""
    return (
        f'<figure id="chart-{name}" data-chart="{name}" data-title="{html.escape(title)}">'
        f"<figcaption><h2>{html.escape(title)}</h2>"
        f'<span class="unit">{html.escape(unit)}</span><span class="tools">{choice}'
        f'<label><input type="checkbox" class="log"{checked}> log</label>'
        '<button type="button" data-image="png">PNG</button>'
        '<button type="button" data-image="svg">SVG</button></span></figcaption>'
        '<div class="plot"></div></figure>'
    )


def ranking_section(rows: Rows) -> str:
    """All runs by perplexity, the best marked, the best value of some columns too."""
    best = best_values([row for row, _ in rows])
    body = []
    for place, (row, _) in enumerate(rows):
        is_best = place == 0 and len(rows) > 1 and row.perplexity is not None
        line = []
        for name, text in zip(COLUMNS, cells(row), strict=True):
            value = getattr(row, name)
            if name == "label":
                star = "<b title='best'>★</b> " if is_best else ""
                line.append(
                    f'<th scope="row" data-value="{place}"><span class="swatch" data-run="{place}">'
                    f"</span>{star}{html.escape(text)}</th>"
                )
                continue
            top = ' class="top"' if name in best and value == best[name] else ""
            sortable = f"{value!r}" if isinstance(value, NUMERIC) else text
            line.append(f'<td{top} data-value="{html.escape(sortable)}">{html.escape(text)}</td>')
        body.append(f"<tr{' class=best' if is_best else ''}>{''.join(line)}</tr>")
    return _section("Ranking", _sortable(list(COLUMNS.values()), body), "ranking")


def events_section(rows: Rows) -> str:
    """Counts of the marked events by run, and the events themselves."""
    marks = [(row.label, marks_of(run)) for row, run in rows]
    kinds = list(dict.fromkeys(mark.kind for _, found in marks for mark in found))
    if not kinds:
        return _section("Events", "<p>No restarts, resumes, skips or rollbacks.</p>", "events")
    counts = [
        [label, *(as_text(counts_of(found).get(kind, 0)) for kind in kinds)]
        for label, found in marks
    ]
    listed = [
        (label, mark) for label, found in marks for mark in some_of_each_kind(found, ROWS_OF_A_KIND)
    ]
    total, listed = sum(len(found) for _, found in marks), listed[:MOST_ROWS]
    note = ""
    if len(listed) < total:
        note = f"<p>{len(listed):,} of {total:,} events; metrics.jsonl has all.</p>"
    heads = ["run", "update", "event", "time (UTC)", "details"]
    body = [_event_row(label, mark) for label, mark in listed]
    return _section(
        "Events",
        scrolling_table(["run", *kinds], counts) + note + _sortable(heads, body, "long"),
        "events",
    )


def _event_row(label: str, mark: Mark) -> str:
    kind, update, time, details = (html.escape(str(value)) for value in astuple(mark))
    return (
        f'<tr><th scope="row">{html.escape(label)}</th><td data-value="{update}">{mark.update:,}'
        f'</td><td>{kind}</td><td>{time}</td><td class="text">{details}</td></tr>'
    )


def settings_section(rows: Rows) -> str:
    """Settings that differ; final numbers and whole configurations, folded."""
    runs = [run for _, run in rows]
    labels = [row.label for row, _ in rows]
    numbers = [final_numbers(run) for run in runs]
    final = [(name, [as_text(values[name]) for values in numbers]) for name in numbers[0]]
    parts = []
    if len(runs) > 1:
        different = config_differences(runs)
        parts.append(_by_run(labels, different) if different else "<p>None.</p>")
    parts.append(_folded("All final numbers", _by_run(labels, final)))
    some = runs[:MOST_CONFIGURATIONS]
    keys = dict.fromkeys(key for run in some for key in run.config)
    whole = [(key, [as_text(run.config.get(key)) for run in some]) for key in keys]
    more = f", {len(some)} best runs" if len(some) < len(runs) else ""
    parts.append(_folded(f"Configuration{more}", _by_run(labels[: len(some)], whole)))
    title = "Settings that differ" if len(runs) > 1 else "Settings"
    return _section(title, "".join(parts), "settings")


def problems_section(collected: Collected) -> str:
    """Runs that could not be read, lines of metrics that were skipped; empty if none."""
    lines = list(collected.unreadable)
    lines += [
        f"{run.folder}: {run.skipped_lines:,} damaged lines of its metrics are skipped"
        for run in collected.runs
        if run.skipped_lines
    ]
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return _section("Not shown", f"<ul>{items}</ul>", "problems")


def scrolling_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls in itself; the first cell of a row heads it."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join(
        f"<tr><th>{html.escape(name)}</th>" + "".join(_cell(value) for value in values) + "</tr>"
        for name, *values in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _cell(value: str) -> str:
    kind = ' class="text"' if len(value) > LONGEST_IN_A_LINE else ""
    return f"<td{kind}>{html.escape(value)}</td>"


def _by_run(labels: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    """A table of values per run: runs as columns, or as rows if they are many."""
    if len(labels) <= RUNS_AS_COLUMNS:
        return scrolling_table(["", *labels], [[name, *values] for name, values in rows])
    turned = [[label, *(values[i] for _, values in rows)] for i, label in enumerate(labels)]
    return scrolling_table(["", *(name for name, _ in rows)], turned)


def _sortable(heads: Sequence[str], body: Sequence[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col" class="sort">{html.escape(text)}</th>' for text in heads)
    return (
        f'<div class="scroll {kind}" tabindex="0"><table class="sortable"><thead><tr>{head}</tr>'
        f"</thead><tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _section(title: str, content: str, name: str) -> str:
    return f'<section id="{name}"><h2>{html.escape(title)}</h2>{content}</section>'
