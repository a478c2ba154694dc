"""Curves of runs: which there are, their points, and points thinned until a page can hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megalr.report.collect import finite_number
from megalr.run.metrics_reader import Event, Run

MOST_POINTS = 4000
"""Points of one curve."""
FEWEST_POINTS = 100
POINTS_OF_A_CHART = 60_000
"""Shared by the runs, down to :data:`FEWEST_POINTS` each."""
CLOCK_POINTS = 400
FURTHER = "eval_further"


@dataclass(frozen=True)
class Chart:
    """One quantity over time, a curve per run.

    Attributes:
        name: file name and key.
        title: heading.
        event: which events have it.
        unit: of the values; may be empty.
        log: whether the value axis starts logarithmic.
        smooth: whether smoothing applies: there is a point every few updates.
        validation: name of the further validation set, for ``eval_further``.
    """

    name: str
    title: str
    event: str
    unit: str = ""
    log: bool = False
    smooth: bool = False
    validation: str | None = None

    def events(self, run: Run) -> list[Event]:
        """The events of a run that may have it."""
        if self.validation is None:
            return run.series(self.event)
        return run.series(self.event, validation=self.validation)

    def value(self, event: Event) -> float | None:
        """Its value in an event; None where that has none."""
        if self.event == "restart":
            return _of_spectra(event, self.name)
        name = "perplexity" if self.validation is not None else self.name
        return finite_number(event.get(name))


CHARTS = (
    Chart("loss", "Training loss", "step", "nats per target", smooth=True),
    Chart("perplexity", "Validation perplexity", "eval", log=True),
    Chart("learning_rate", "Learning rate", "step"),
    Chart("gradient_norm", "Gradient norm", "step", "before clipping", log=True, smooth=True),
    Chart("tokens_per_second", "Speed", "step", "tokens per second", smooth=True),
    Chart("peak_memory_gib", "Peak memory", "step", "GiB, rank 0"),
    Chart("imbalance", "Factor imbalance", "restart", "before a restart; balanced: 0", log=True),
    Chart("effective_rank", "Effective rank", "restart", "share of r, mean of all kinds"),
)
OVERVIEW = 2
"""The first charts, training loss and validation perplexity, are also drawn as one figure."""


@dataclass(frozen=True)
class Curve:
    """Points of one quantity of one run, thinned.

    Attributes:
        updates: (points,) int64, ascending.
        values: (points,) float64, finite.
        logged: points before thinning.
    """

    updates: np.ndarray
    values: np.ndarray
    logged: int


@dataclass(frozen=True)
class Clock:
    """Tokens and hours as functions of the update, linear between the points.

    Attributes:
        updates: (points,) ascending.
        tokens: (points,) targets trained on so far; None if not logged.
        hours: (points,) in which the run has been running, start-up, evaluation and saving
            included, pauses between its starts excluded; None if the events have no time.
    """

    updates: np.ndarray
    tokens: np.ndarray | None
    hours: np.ndarray | None


def points_per_curve(runs: int) -> int:
    """Points that a curve may have in a report on this number of runs."""
    return min(MOST_POINTS, max(FEWEST_POINTS, POINTS_OF_A_CHART // max(1, runs)))


def curve_of(run: Run, chart: Chart, most: int = MOST_POINTS) -> Curve:
    """The curve of a chart; events without a finite value give no point."""
    found = [(e["update"], chart.value(e)) for e in chart.events(run)]
    points = [(update, value) for update, value in found if value is not None]
    updates = np.array([update for update, _ in points], dtype=np.int64)
    values = np.array([value for _, value in points], dtype=np.float64)
    kept = thinned(values, most)
    return Curve(updates[kept], values[kept], len(points))


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most ``most`` points (at least 4) of (points,) that look the same when drawn.

    The points are divided into equal ranges, and each keeps its smallest and its largest value, so
    that no peak disappears; the first and the last point stay too.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, (most - 2) // 2) + 1).astype(np.int64)
    kept = {0, count - 1}
    for start, stop in pairwise(edges):
        kept.add(int(start + np.argmin(values[start:stop])))
        kept.add(int(start + np.argmax(values[start:stop])))
    return np.array(sorted(kept), dtype=np.int64)


def clock_of(run: Run) -> Clock:
    """Tokens and hours of a run by update."""
    tokens = {e["update"]: finite_number(e.get("tokens")) for e in run.series("step")}
    known_tokens = {u: value for u, value in tokens.items() if value is not None}
    hours = _hours(run)
    updates = np.array(sorted({0, *known_tokens, *hours}), dtype=np.int64)
    if len(updates) > CLOCK_POINTS:
        updates = updates[np.linspace(0, len(updates) - 1, CLOCK_POINTS).astype(np.int64)]
    return Clock(updates, _at(updates, {0: 0.0} | known_tokens), _at(updates, hours))


def _at(updates: np.ndarray, known: dict[int, float]) -> np.ndarray | None:
    """Values at the updates, linear between those known, constant beyond them."""
    if not set(known) - {0}:
        return None
    places = sorted(known)
    return np.interp(updates, places, [known[place] for place in places])


def _hours(run: Run) -> dict[int, float]:
    """Hours of running by update, as of the newest event there that still counts."""
    found: dict[int, float] = {}
    for event, hours in timed(run):
        if event["event"] in ("start", "rollback"):
            back_to = event["update"]
            if event["event"] == "rollback":
                back_to = finite_number(event.get("to_update")) or 0
            found = {update: value for update, value in found.items() if update <= back_to}
        if hours is None:
            continue
        if event["event"] in ("step", "eval"):
            found[event["update"]] = hours
        elif event["event"] == "start":  # of a resumed one the update has been reached before
            found.setdefault(event["update"], hours)
    return found


def timed(run: Run) -> Iterator[tuple[Event, float | None]]:
    """Events in order, each with the hours of running until then; None without a time.

    Running begins ``startup_seconds`` before a ``start`` and ends with the last event before the
    next one.
    """
    before = since = newest = 0.0
    begun = False
    for event in run.events:
        time = finite_number(event.get("time"))
        if time is None:
            yield event, None
            continue
        if event["event"] == "start" or not begun:
            before += newest - since if begun else 0.0
            since = time - (finite_number(event.get("startup_seconds")) or 0.0)
            newest, begun = since, True
        newest = max(newest, time)
        yield event, (before + newest - since) / 3600


def spectra_of(run: Run, most: int) -> dict[str, dict[str, list[Any]]]:
    """Singular values over time: by kind of projection ``update`` and, for each, ``quantiles``.

    At most ``most`` restarts, spread evenly. Events that do not hold what docs/restarts.md says are
    passed over.
    """
    events = [e for e in run.series("restart") if isinstance(e.get("spectra"), dict)]
    if len(events) > most:
        places = np.linspace(0, len(events) - 1, most).astype(int)
        events = [events[place] for place in places]
    found: dict[str, dict[str, list[Any]]] = {}
    for event in events:
        for kind, summary in event["spectra"].items():
            quantiles = summary.get("singular_values") if isinstance(summary, dict) else None
            if not isinstance(quantiles, list) or len(quantiles) != 7:
                continue
            series = found.setdefault(str(kind), {"update": [], "quantiles": []})
            series["update"].append(event["update"])
            series["quantiles"].append([finite_number(value) for value in quantiles])
    return found


def _of_spectra(event: Event, name: str) -> float | None:
    """Largest imbalance, or mean effective rank as a share of r, of a restart's kinds."""
    spectra = event.get("spectra")
    summaries = list(spectra.values()) if isinstance(spectra, dict) else []
    summaries = [summary for summary in summaries if isinstance(summary, dict)]
    if name == "imbalance":
        found = _numbers(summary.get("imbalance") for summary in summaries)
        found += _numbers([event.get("imbalance")])
        return max(found, default=None)
    shares = []
    for summary in summaries:
        effective, rank = (
            finite_number(summary.get("effective_rank")),
            finite_number(summary.get("rank")),
        )
        if effective is not None and rank:
            shares.append(effective / rank)
    return sum(shares) / len(shares) if shares else None


def _numbers(values: Any) -> list[float]:
    return [value for value in map(finite_number, values) if value is not None]


def drawn_charts(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """The charts for which some run has a point, and the others."""
    charts = [*CHARTS[:OVERVIEW], *_further_charts(runs), *CHARTS[OVERVIEW:]]
    events = {chart.name: [e for run in runs for e in chart.events(run)] for chart in charts}
    has = {c.name: any(c.value(e) is not None for e in events[c.name]) for c in charts}
    return [c for c in charts if has[c.name]], [c for c in charts if not has[c.name]]


def _further_charts(runs: Sequence[Run]) -> list[Chart]:
    """Perplexity on each further validation set, in the order in which the runs name them."""
    names = [e.get("validation") for run in runs for e in run.events if e["event"] == FURTHER]
    return [
        Chart(f"perplexity_{place}", f"Perplexity, {name}", FURTHER, log=True, validation=name)
        for place, name in enumerate(dict.fromkeys(filter(_is_text, names)), start=2)
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
