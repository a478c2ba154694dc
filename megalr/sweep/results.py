"""The numbers of a sweep's runs, and ``runs.csv`` and ``history.csv`` in its folder."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megalr.config.restarts import RestartsConfig
from megalr.errors import UserError
from megalr.files import write_atomic
from megalr.run.metrics_reader import Event
from megalr.sweep.grid import PlannedRun
from megalr.sweep.run_record import RunRecord, Status, read_events, read_record, status_of

RUNS_CSV = "runs.csv"
HISTORY_CSV = "history.csv"
HISTORY = ("run", "update", "tokens", "seconds", "validation", "loss", "perplexity")
FIRST = ("sweep", "run", "group")
NUMBERS = (
    "seed",
    "status",
    "error",
    "method",
    "optimizer",
    "precision",
    "restarts",
    "rank",
    "alpha",
    "lr",
    "lr_ratio_embedding",
    "lr_ratio_head",
    "updates",
    "tokens",
    "unique_tokens",
    "loss",
    "perplexity",
    "best_perplexity",
    "parameters",
    "weights_and_states_gib",
    "peak_memory_gib",
    "tokens_per_second",
    "seconds",
    "gpu_seconds",
    "gpu",
    "version",
)
"""Columns after those of the axes; further ones (``perplexity_NAME``) follow ``perplexity``."""

Row = dict[str, Any]


def axis_column(axis: str) -> str:
    """The column of an axis; the prefix keeps an axis ``lr`` apart from the learning rate."""
    return f"axis_{axis}"


class Results:
    """Rows of all runs of a sweep: read once, again for runs that have ended since.

    Attributes:
        rows: by the name of the run: the planned ones in their order, then those of earlier calls
            that are no longer planned.
        history: evaluations by run.
    """

    def __init__(self, sweep: str, output: Path, runs: Sequence[PlannedRun]) -> None:
        self.sweep, self.output = sweep, output
        self.rows: dict[str, Row] = {}
        self.history: dict[str, list[Row]] = {}
        for run in runs:
            self.update(run)
        for row in read_csv(output / RUNS_CSV):
            self.rows.setdefault(row["run"], row)
        for row in read_csv(output / HISTORY_CSV):
            if row["run"] not in {run.name for run in runs}:
                self.history.setdefault(row["run"], []).append(row)

    def update(self, run: PlannedRun) -> Row:
        """Read a run again; its row."""
        record, events = read_record(run.folder), read_events(run.folder)
        row: Row = {"sweep": self.sweep, "run": run.name, "group": run.group}
        row |= {axis_column(axis): point.label for axis, point in run.points.items()}
        row |= run_row(run, record, events)
        self.rows[run.name] = row
        self.history[run.name] = history_rows(run.name, events)
        return row

    def write(self) -> None:
        """Replace both files; readers see the old content or the new."""
        axes: dict[str, None] = {}
        further: dict[str, None] = {}
        for row in self.rows.values():
            axes |= dict.fromkeys(key for key in row if key.startswith("axis_"))
            further |= dict.fromkeys(key for key in row if key.startswith("perplexity_"))
        at = NUMBERS.index("perplexity") + 1
        columns = [*FIRST, *axes, *NUMBERS[:at], *further, *NUMBERS[at:]]
        write_csv(self.output / RUNS_CSV, columns, self.rows.values())
        lines = [row for rows in self.history.values() for row in rows]
        write_csv(self.output / HISTORY_CSV, HISTORY, lines)

    def count(self, status: Status) -> int:
        """Runs with this status."""
        return sum(row["status"] == status for row in self.rows.values())


def run_row(run: PlannedRun, record: RunRecord | None, events: list[Event]) -> Row:
    """The numbers of one run under :data:`NUMBERS`; None where there is none."""
    config = run.config
    status = status_of(config, record, events)
    steps, start = _series(events, "step"), _last(events, "start")
    evaluations = _series(events, "eval")
    last = evaluations[-1] if evaluations else {}
    step = steps[-1] if steps else {}
    tokens: Any = step.get("tokens")
    available: Any = start.get("train_tokens")
    speeds = [s["tokens_per_second"] for s in steps if "tokens_per_second" in s]
    named = [e for e in (last, *_last_of_sets(events)) if "validation" in e]
    seen = [e["perplexity"] for e in evaluations if math.isfinite(e["perplexity"])]
    attempts = record.attempts if record is not None else []
    versions = start.get("versions", {})
    method: Any = config.method
    return {
        "seed": run.seed,
        "status": status,
        "error": attempts[-1].line if attempts and attempts[-1].failed else None,
        "method": method.name,
        "optimizer": config.optimizer.name,
        "precision": config.train.precision,
        "restarts": describe_restarts(config.restarts),
        "rank": getattr(method, "rank", None),
        "alpha": getattr(method, "alpha", None),
        "lr": config.optimizer.lr,
        "lr_ratio_embedding": config.optimizer.lr_ratio.embedding,
        "lr_ratio_head": config.optimizer.lr_ratio.head,
        "updates": step.get("update", 0),
        "tokens": tokens,
        "unique_tokens": None if None in (tokens, available) else min(tokens, available),
        "loss": last.get("loss"),
        "perplexity": last.get("perplexity"),
        **{f"perplexity_{e['validation']}": e["perplexity"] for e in named},
        "best_perplexity": min(seen, default=None),
        "parameters": start.get("parameters"),
        "weights_and_states_gib": round(run.states_gib, 6),
        "peak_memory_gib": step.get("peak_memory_gib"),
        "tokens_per_second": round(median(speeds), 1) if speeds else None,
        "seconds": round(sum(a.seconds for a in attempts), 3) if attempts else None,
        "gpu_seconds": _gpu_seconds(steps, start),
        "gpu": versions.get("device"),
        "version": "-".join(versions[k] for k in ("megalr", "commit") if k in versions) or None,
    }


def describe_restarts(restarts: RestartsConfig) -> str:
    """Restarts in a few words: ``every 100``, ``reset 50 + reset_scope layers``, or none."""
    refactorize, reset = restarts.refactorize_period, restarts.reset_period
    parts = []
    if refactorize is not None and refactorize == reset:
        parts.append(f"every {reset}")
    else:
        parts += [f"refactorize {refactorize}"] if refactorize is not None else []
        parts += [f"reset {reset}"] if reset is not None else []
    for name in ("imbalance_threshold", "gradient_norm_spike"):
        if getattr(restarts, name) is not None:
            parts.append(f"{name} {getattr(restarts, name):g}")
    scope = restarts.reset_scope
    parts += [f"reset_scope {scope}"] if restarts.resets and scope != "all" else []
    return " + ".join(parts) or "none"


def training_seconds(steps: list[Event]) -> list[tuple[int, float]]:
    """(update, seconds of training up to it) after every log line; evaluation, saving and restarts
    are not in it."""
    total, before, found = 0.0, 0, []
    for step in steps:
        total += step.get("step_seconds", 0.0) * (step["update"] - before)
        before = step["update"]
        found.append((before, total))
    return found


def history_rows(name: str, events: list[Event]) -> list[Row]:
    """One row per evaluation and set. Tokens and seconds are those of the log line at its
    update, or, between two lines, in proportion."""
    steps = _series(events, "step")
    tokens = [(0, 0.0), *((s["update"], float(s["tokens"])) for s in steps if "tokens" in s)]
    seconds = [(0, 0.0), *training_seconds(steps)]
    return [
        {
            "run": name,
            "update": e["update"],
            "tokens": round(_between(tokens, e["update"])),
            "seconds": round(_between(seconds, e["update"]), 4),
            "validation": e.get("validation"),
            "loss": e["loss"],
            "perplexity": e["perplexity"],
        }
        for e in (*_series(events, "eval"), *_series(events, "eval_further"))
    ]


def _between(points: list[tuple[int, float]], x: int) -> float:
    """The value at x on the line through the points around it; the last point's beyond."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _gpu_seconds(steps: list[Event], start: Event) -> float | None:
    """Seconds of training times the GPUs that the run had."""
    times = training_seconds(steps)
    return round(times[-1][1] * start.get("world_size", 1), 3) if times else None


def _series(events: list[Event], kind: str) -> list[Event]:
    """Events of a kind by update and validation set; the newest of repeated ones."""
    newest = {(e["update"], e.get("validation")): e for e in events if e["event"] == kind}
    return sorted(newest.values(), key=lambda event: event["update"])


def _last_of_sets(events: list[Event]) -> list[Event]:
    """The last evaluation on every further set."""
    return list({e["validation"]: e for e in _series(events, "eval_further")}.values())


def _last(events: list[Event], kind: str) -> Event:
    return next((event for event in reversed(events) if event["event"] == kind), {})


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace a CSV; missing values are empty, floats are exact."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Row]:
    """The rows of such a file as text; [] if there is none.

    Raises:
        UserError: it is no such table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove it, it is made again") from error
    if "run" not in (reader.fieldnames or ()):
        raise UserError(f"{path}: is no table of a sweep: remove it, or choose another --output")
    return rows
