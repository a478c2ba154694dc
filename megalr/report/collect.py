"""Runs to report on: found in folders, labelled, their settings compared, their numbers as text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalr.errors import UserError
from megalr.run.folder import CONFIG, METRICS
from megalr.run.metrics_reader import Run, read_run

NOT_SETTINGS = ("run.dir",)
"""Keys that differ between any two runs."""


@dataclass(frozen=True)
class Collected:
    """Runs in order, and a line about each one below a folder that could not be read."""

    runs: tuple[Run, ...]
    unreadable: tuple[str, ...] = ()


def collect_runs(paths: Sequence[Path]) -> Collected:
    """Read runs, each once: a path is the folder of a run or a folder with runs anywhere below.

    Raises:
        UserError: a path that is named is no run and has none below, or its run cannot be read.
    """
    runs: dict[Path, Run] = {}
    unreadable = []
    for path in paths:
        if _is_run(path) or not path.is_dir():
            runs.setdefault(path.resolve(), read_run(path))
            continue
        below = _runs_below(path)
        readable = 0
        for folder in below:
            try:
                runs.setdefault(folder.resolve(), read_run(folder))
                readable += 1
            except UserError as error:
                unreadable.append(str(error))
        if not below:
            raise UserError(f"{path}: no run folder: no {METRICS} in it or in a folder below it")
        if not readable:
            raise UserError(f"{path}: no run below it can be read: {unreadable[-1]}")
    return Collected(tuple(runs.values()), tuple(unreadable))


def _is_run(path: Path) -> bool:
    return (path / METRICS).exists() or (path / CONFIG).exists()


def _runs_below(folder: Path) -> list[Path]:
    """Folders with metrics, by path; a run's own folders are not searched."""
    found = []
    for name, folders, files in os.walk(folder):
        folders.sort()
        if METRICS in files:
            found.append(Path(name))
            folders.clear()
    return found


def labelled(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """(label, run): the folder's name, or where names repeat, its path below the common folder."""
    names = [run.name for run in runs]
    folders = [run.folder.resolve() for run in runs]
    common = os.path.commonpath(folders) if folders else ""
    return [
        (name if names.count(name) == 1 else os.path.relpath(folder, common), run)
        for name, folder, run in zip(names, folders, runs, strict=True)
    ]


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, value per run as text) for every key whose value differs between the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NOT_SETTINGS)
    rows = [(key, [as_text(run.config.get(key, "—")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def final_numbers(run: Run) -> dict[str, Any]:
    """Final numbers of a run, by their names in the report."""
    start, step, evaluation = run.last("start"), run.latest("step"), run.latest("eval")
    restarts = [e for e in run.events if e["event"] == "restart"]
    return {
        "model": start.get("model"),
        "method": start.get("method"),
        "parameters": start.get("parameters"),
        "precision": start.get("precision"),
        "ZeRO stage": start.get("zero_stage"),
        "ranks": start.get("world_size"),
        "updates": updates_of(run),
        "training tokens": step.get("tokens"),
        "training loss": step.get("loss"),
        "validation loss": evaluation.get("loss"),
        "validation perplexity": evaluation.get("perplexity"),
        "perplexity, published formula": evaluation.get("perplexity_published"),
        "validation tokens": evaluation.get("tokens"),
        "tokens per second (median)": median_speed(run),
        "model FLOP utilisation": step.get("mfu"),
        "peak memory (GiB)": step.get("peak_memory_gib"),
        "restarts": len(restarts),
        "refactorization time (s)": sum(e.get("refactorize_seconds", 0) for e in restarts),
        "ended": end_of(run),
        "lines of metrics skipped": run.skipped_lines,
        "versions": start.get("versions"),
    }


def updates_of(run: Run) -> int:
    """Updates that the run has logged, without those that it went back over."""
    return max((e["update"] for kind in ("step", "eval") for e in run.series(kind)), default=0)


def end_of(run: Run) -> str:
    """Reason of the end of the last start; ``not yet`` while it runs, or if it was killed."""
    newest = next((e for e in reversed(run.events) if e["event"] in ("start", "end")), {})
    return str(newest.get("reason", "not yet"))


def median_speed(run: Run) -> float | None:
    """Upper median of the logged tokens per second; None where none was logged."""
    found = (finite_number(e.get("tokens_per_second")) for e in run.series("step"))
    speeds = sorted(value for value in found if value is not None)
    return speeds[len(speeds) // 2] if speeds else None


def finite_number(value: Any) -> float | None:
    """A finite number of an event as a float; None for anything else that may stand there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return value if math.isfinite(value) else None


def as_text(value: Any) -> str:
    """A value of an event or a configuration as a cell of a table."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value)
    return str(value)
