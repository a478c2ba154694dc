"""The order of runs by validation perplexity, its columns, and the finding in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megalr.report.collect import (
    as_text,
    config_differences,
    end_of,
    finite_number,
    labelled,
    median_speed,
    updates_of,
)
from megalr.report.curves import timed
from megalr.run.metrics_reader import Run

MOST_KEYS = 6
"""Names of settings in a sentence."""

DECIDES_PERPLEXITY = (
    "data.validation",
    "data.sequence_length",
    "data.packing",
    "evaluation.tokens",
    "evaluation.final_tokens",
    "model.vocab_size",
)
"""Settings that change what a perplexity means."""

COMPARED = ("method", "optimizer", "schedule", "restarts", "model", "data", "train")
"""Sections that a comparison is about; the others are named last."""

BEST_IS = {
    "perplexity": min,
    "last_perplexity": min,
    "tokens_per_second": max,
    "memory_gib": min,
}
"""Columns in which the best value is marked."""


@dataclass(frozen=True)
class Standing:
    """A run's row of the ranking; None where a run has not recorded something.

    Attributes:
        label: of the run.
        method, rank, optimizer, lr: as configured.
        parameters: of the whole model.
        perplexity: lowest validation perplexity.
        at_update: where that was.
        last_perplexity: validation perplexity of the last evaluation.
        tokens: trained on.
        tokens_per_second: median.
        memory_gib: peak on rank 0.
        hours: of running, see :class:`~megalr.report.curves.Clock`.
        ranks: number of ranks of the last start.
        updates: made so far.
        ended: reason of the end; ``not yet`` if there is none.
    """

    label: str
    method: Any
    rank: Any
    optimizer: Any
    lr: float | None
    parameters: Any
    perplexity: float | None
    at_update: int | None
    last_perplexity: float | None
    tokens: Any
    tokens_per_second: float | None
    memory_gib: float | None
    hours: float | None
    ranks: Any
    updates: int
    ended: str


COLUMNS = {
    "label": "run",
    "perplexity": "perplexity, best",
    "at_update": "at update",
    "last_perplexity": "perplexity, last",
    "method": "method",
    "rank": "rank r",
    "optimizer": "optimizer",
    "lr": "lr",
    "parameters": "parameters",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "memory_gib": "memory, GiB",
    "hours": "hours",
    "ranks": "ranks",
    "updates": "updates",
    "ended": "ended",
}
"""Heading of each field, in the order of the table."""


Rows = Sequence[tuple[Standing, Run]]
"""Runs in the order of the ranking."""


def standing(label: str, run: Run) -> Standing:
    """The row of one run."""
    start, step, config = run.last("start"), run.latest("step"), run.config
    evaluations = [(finite_number(e.get("perplexity")), e["update"]) for e in run.series("eval")]
    finite = [(value, update) for value, update in evaluations if value is not None]
    best, at_update = min(finite, default=(None, None))
    all_hours = [hours for _, hours in timed(run) if hours is not None]
    memory = [finite_number(e.get("peak_memory_gib")) for e in run.series("step")]
    return Standing(
        label=label,
        method=start.get("method", config.get("method.name")),
        rank=config.get("method.rank"),
        optimizer=start.get("optimizer", config.get("optimizer.name")),
        lr=finite_number(config.get("optimizer.lr")),
        parameters=start.get("parameters"),
        perplexity=best,
        at_update=at_update,
        last_perplexity=evaluations[-1][0] if evaluations else None,
        tokens=step.get("tokens"),
        tokens_per_second=median_speed(run),
        memory_gib=max((value for value in memory if value is not None), default=None),
        hours=all_hours[-1] if all_hours else None,
        ranks=start.get("world_size"),
        updates=updates_of(run),
        ended=end_of(run),
    )


def ranked(runs: Sequence[Run]) -> list[tuple[Standing, Run]]:
    """Runs by lowest validation perplexity; those without an evaluation come last, in order."""
    rows = [(standing(label, run), run) for label, run in labelled(runs)]
    return sorted(rows, key=lambda row: (row[0].perplexity is None, row[0].perplexity or 0.0))


def best_values(rows: Sequence[Standing]) -> dict[str, Any]:
    """The best value of each column of :data:`BEST_IS`, if the runs differ in it."""
    found = {}
    for name, best in BEST_IS.items():
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if len(set(values)) > 1:
            found[name] = best(values)
    return found


def finding(rows: Rows) -> list[str]:
    """Sentences for the head of the page: the best run, how it compares, settings that differ."""
    first = rows[0][0]
    if first.perplexity is None:
        sentences = ["No run has been evaluated yet."]
    elif len(rows) == 1:
        sentences = [_progress(*rows[0])]
    else:
        text = f"Best is {first.label} with a validation perplexity of {as_text(first.perplexity)}"
        text += f" after {first.at_update:,} updates"
        second = rows[1][0]
        if second.perplexity is not None:
            more = second.perplexity / first.perplexity - 1
            text += f"; next {second.label} with {as_text(second.perplexity)} (+{more:.1%})"
        sentences = [text + "."]
    if len(rows) > 1:
        sentences += _differences([run for _, run in rows])
    return sentences


def _progress(row: Standing, run: Run) -> str:
    """What one run alone has reached."""
    opening = run.series("eval")[0]
    first = finite_number(opening.get("perplexity"))
    text = f"{row.label} reached a validation perplexity of {as_text(row.perplexity)}"
    text += f" after {row.at_update:,} updates"
    if first is not None and opening["update"] != row.at_update:
        text += f", from {as_text(first)} after {opening['update']:,}"
    if row.last_perplexity != row.perplexity:
        text += f"; the last evaluation gave {as_text(row.last_perplexity)}"
    return text + "."


def _differences(runs: Sequence[Run]) -> list[str]:
    keys = [key for key, _ in config_differences(runs)]
    keys.sort(key=lambda key: key.split(".")[0] not in COMPARED)
    if not keys:
        return [f"The {len(runs)} runs have the same settings."]
    named, more = keys[:MOST_KEYS], len(keys) - MOST_KEYS
    listed = ", ".join(named) + (f" and {more} more" if more > 0 else "")
    sentences = [f"The {len(runs)} runs differ in {listed}."]
    deciding = [key for key in keys if key in DECIDES_PERPLEXITY]
    if deciding:
        sentences.append(
            f"Their perplexities may not be comparable: {', '.join(deciding)} differs."
        )
    return sentences


def cells(row: Standing) -> list[str]:
    """The row as text, in the order of :data:`COLUMNS`."""
    values = {item.name: getattr(row, item.name) for item in fields(row)}
    return [as_text(values[name]) for name in COLUMNS]
