"""Events that are marked on the curves and listed: restarts, resumes, forks, skips, rollbacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from megalr.report.collect import as_text, finite_number
from megalr.run.metrics_reader import Event, Run

MEASUREMENTS = ("step", "eval", "eval_further", "start", "import", "compile", "checkpoint", "end")
"""Events that are no marks; every other one is, those of later versions too."""

DETAILS: dict[str, tuple[str, ...]] = {
    "restart": (
        "trigger",
        "refactorized",
        "reset",
        "imbalance",
        "fraction_reset",
        "matrices_by_qr",
        "dead_directions",
        "skipped_nonfinite",
    ),
    "fork": ("path", "source_update", "state", "changed"),
    "resume": ("path", "reshaped", "damaged", "allowed", "extended"),
    "rollback": ("to_update", "reason", "first_batch_left_out", "batches_left_out"),
}
"""Fields that are shown of an event; of others all that are short."""

LONGEST_VALUE = 120
ROWS_OF_A_KIND = 20
"""Rows in the table for one kind of event of one run."""
MOST_ROWS = 2000
MARKS_OF_A_KIND = 200
"""Marks on a curve for one kind of event."""


@dataclass(frozen=True)
class Mark:
    """One event.

    Attributes:
        kind: the event's name.
        update: updates done.
        time: UTC as text; empty if not recorded.
        details: its fields as text.
    """

    kind: str
    update: int
    time: str
    details: str


def marks_of(run: Run) -> list[Mark]:
    """The marked events of a run in order.

    A start that begins again at update 0 is one too, as kind ``begun again``.
    """
    found = []
    started = False
    for event in run.events:
        kind = event["event"]
        if kind == "start":
            if started and event["update"] == 0:
                found.append(Mark("begun again", 0, _time(event), "no checkpoint to resume from"))
            started = True
        elif kind not in MEASUREMENTS:
            found.append(Mark(kind, event["update"], _time(event), _details(event)))
    return found


def counts_of(marks: Sequence[Mark]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(Counter(mark.kind for mark in marks))


def some_of_each_kind(marks: Sequence[Mark], most: int) -> list[Mark]:
    """At most ``most`` marks of each kind in their order, spread evenly over those there are."""
    totals, seen = counts_of(marks), Counter[str]()
    kept = []
    for mark in marks:
        total, place = totals[mark.kind], seen[mark.kind]
        seen[mark.kind] += 1
        # Of total marks those where place * most / total passes a whole number.
        if total <= most or place * most // total != (place - 1) * most // total:
            kept.append(mark)
    return kept


def _details(event: Event) -> str:
    names = DETAILS.get(event["event"])
    if names is None:
        names = tuple(name for name in event if name not in ("event", "update", "time", "spectra"))
    parts = []
    for name in names:
        value = event.get(name)
        if not value:  # no, none, nothing
            continue
        text = as_text(value)
        if len(text) <= LONGEST_VALUE:
            parts.append(f"{name.replace('_', ' ')}: {text}")
    return "; ".join(parts)


def _time(event: Event) -> str:
    seconds = finite_number(event.get("time"))
    if seconds is None or not 0 <= seconds < 2**37:  # up to the year 6000
        return ""
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
