"""Reading a run's folder back: its configuration and the events of its metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from megalr.errors import UserError
from megalr.run.folder import METRICS, read_config

Event = dict[str, Any]

SHOWN_LINES = 5
"""Warnings about single lines of a file; the rest is counted."""


@dataclass(frozen=True)
class Run:
    """Contents of a run folder.

    Attributes:
        name: the folder's name.
        folder: the folder.
        config: its configuration, by dotted keys.
        events: in order.
        skipped_lines: lines of the metrics that are no events.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    events: tuple[Event, ...]
    skipped_lines: int = field(default=0, compare=False)

    def last(self, event: str) -> Event:
        """The newest event of a kind, {} when there is none."""
        return next((e for e in reversed(self.events) if e["event"] == event), {})

    def series(self, event: str, **having: Any) -> list[Event]:
        """Events of a kind, with these values of fields, by update; the newest of a repeated one.

        Those of updates that a resume or a rollback went back over do not count.
        """
        found = self._counted.get(event, [])
        newest = {e["update"]: e for e in found if all(e.get(k) == v for k, v in having.items())}
        return [newest[update] for update in sorted(newest)]

    @cached_property
    def _counted(self) -> dict[str, list[Event]]:
        """Events in order by kind, without those of updates that the run went back over."""
        found: dict[str, list[Event]] = {}
        for item in self.events:
            back_to = item["update"] if item["event"] == "start" else item.get("to_update")
            if isinstance(back_to, int) and item["event"] in ("start", "rollback"):
                for kind, events in found.items():
                    found[kind] = [e for e in events if e["update"] <= back_to]
            found.setdefault(item["event"], []).append(item)
        return found

    def latest(self, event: str) -> Event:
        """The last of :meth:`series`, {} when there is none."""
        return next(reversed(self.series(event)), {})


class _Event(BaseModel):
    """The fields of an event that readers compute with; others may hold anything."""

    model_config = ConfigDict(strict=True, extra="allow")

    event: str
    update: int = Field(ge=0, le=2**53)  # a float64 holds it
    loss: float | None = None
    perplexity: float | None = None
    tokens: NonNegativeInt | None = None
    tokens_per_second: float | None = None
    refactorize_seconds: float = 0.0

    @model_validator(mode="after")
    def _check_evaluation(self) -> _Event:
        if self.event == "eval" and (self.loss is None or self.perplexity is None):
            raise ValueError("an evaluation needs loss and perplexity")
        return self


def read_run(folder: Path) -> Run:
    """Read a run folder.

    A last line that a crash cut short is ignored. Other lines that are no event are skipped with a
    warning that names them.

    Raises:
        UserError: the folder holds no run, or no update was logged yet.
    """
    path = folder / METRICS
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{folder}: no run folder: {path.name} is not a regular file")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{folder}: no run folder: cannot read {path.name}: {error.strerror}"
        ) from error
    events: list[Event] = []
    bad: list[str] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            _Event.model_validate_json(line)
            events.append(json.loads(line))
        except ValueError:
            bad.append(f"{path}:{number}: no event of a run, skipped: {line[:60]!r}")
    for text in bad[:SHOWN_LINES]:
        print(f"warning: {text}", file=sys.stderr)
    if len(bad) > SHOWN_LINES:
        print(f"warning: {path}: {len(bad) - SHOWN_LINES} more lines skipped", file=sys.stderr)
    if not any(event["event"] in ("step", "eval") for event in events):
        raise UserError(f"{path}: no update was logged yet")
    config = {
        f"{section}.{key}": value
        for section, values in read_config(folder).items()
        for key, value in values.items()
    }
    return Run(folder.resolve().name, folder, config, tuple(events), len(bad))


def perplexity_change(run: Run) -> str:
    """One line: validation perplexity at the first and the last evaluation."""
    evaluations = run.series("eval")
    if not evaluations:
        return "no evaluation"
    first, last = evaluations[0], evaluations[-1]
    return (
        f"validation perplexity {first['perplexity']:.1f} after {first['update']} updates, "
        f"{last['perplexity']:.1f} after {last['update']}"
    )


def perplexity_of(loss: float) -> float:
    """exp(loss); infinity instead of an overflow error."""
    return math.exp(loss) if loss < 709 else math.inf
