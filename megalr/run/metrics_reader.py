"""Reading a run's folder back: its configuration and the events of its metrics.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalr.errors import UserError
from megalr.run.folder import METRICS

Event = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Contents of a run folder: name, configuration (dotted keys), events in order."""

    name: str
    folder: Path
    config: dict[str, Any]
    events: tuple[Event, ...]

    def last(self, event: str) -> Event:
        """The newest event of a kind, {} when there is none."""
        return next((e for e in reversed(self.events) if e["event"] == event), {})

    def series(self, event: str) -> list[Event]:
        """Events of a kind by update; the newest of a repeated update."""
        newest = {e["update"]: e for e in self.events if e["event"] == event}
        return [newest[update] for update in sorted(newest)]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    A last line that was cut off by a crash is left out. Raises UserError when the folder holds no
    run, a line of its metrics is damaged, or nothing was trained yet.
    """
    path = folder / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise UserError(
            f"{folder}: no run folder: cannot read {path.name}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged: not UTF-8 text (byte {error.start})") from error
    events = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            event = json.loads(line)
            if not isinstance(event["event"], str) or not isinstance(event["update"], int):
                raise TypeError
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{path}: line {number} is no event of a run: {line!r:.60}") from error
        events.append(event)
    if not any(event["event"] in ("step", "eval") for event in events):
        raise UserError(f"{path}: no update was logged yet")
    return Run(folder.resolve().name, folder, _read_config(folder), tuple(events))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {
            f"{section}.{key}": value
            for section, values in sections.items()
            for key, value in values.items()
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: cannot read the configuration of the run") from error


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
