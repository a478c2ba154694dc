"""What became of a run: its events, and a record of its attempts beside its log.

``RUN/logs/sweep.json`` holds the configuration that the sweep gave the run and, for every attempt
that it saw end, exit code, seconds and last line. Everything else is read from the run's metrics.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from megalr.config.resuming import diff_configs
from megalr.config.schema import RunConfig
from megalr.distributed.signals import STOPPED
from megalr.errors import UserError
from megalr.files import write_atomic
from megalr.run.folder import METRICS, has_updates
from megalr.run.metrics_reader import Event

RECORD = "logs/sweep.json"
LOG = "logs/sweep.log"

LAST_OWN_CODE = 128
"""Exit codes above it are a shell's for a process that a signal has ended."""

Status = Literal["pending", "finished", "failed", "diverged"]

FREE_KEYS = ("run.dir", "run.resume", "run.timeout_seconds", "checkpoint.", "log.")
"""Keys that may change between two calls of a sweep: they leave the results as they are."""


@dataclass
class Attempt:
    """One start of a run that has ended.

    Attributes:
        code: exit code; -n, or 128 + n from a shell: killed by signal n.
        seconds: from its start to its end.
        line: the last line of its log that says something.
    """

    code: int
    seconds: float
    line: str

    @property
    def failed(self) -> bool:
        """Whether it ended by an error; a start that was stopped or killed goes on later."""
        return 0 < self.code <= LAST_OWN_CODE and self.code != STOPPED


@dataclass
class RunRecord:
    """The record of a run.

    Attributes:
        config: the configuration, as in the run's folder.
        attempts: its starts that have ended, the oldest first.
    """

    config: dict[str, Any]
    attempts: list[Attempt] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        path = folder / RECORD
        write_atomic(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_record(folder: Path) -> RunRecord | None:
    """The record in a run's folder; None if the sweep has not started the run.

    Raises:
        UserError: it is no such record.
    """
    path = folder / RECORD
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(saved["config"], [Attempt(**attempt) for attempt in saved["attempts"]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as the record of a run ({error}): remove the folder "
            f"{folder} to run it again"
        ) from error


def read_events(folder: Path) -> list[Event]:
    """The whole lines of a run's metrics; [] before its first start has written one."""
    try:
        lines = (folder / METRICS).read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(event, dict) and "event" in event and "update" in event:
            events.append(event)
    return events


def status_of(config: RunConfig, record: RunRecord | None, events: list[Event]) -> Status:
    """What became of a run.

    ``diverged``: it finished with a loss that is not finite, or its health check gave it up.
    ``pending``: not started, or stopped or killed, so that it can go on.
    """
    if _finished(events):
        evaluation = _last(events, "eval") or _last(events, "step")
        return "finished" if math.isfinite(evaluation.get("loss", math.nan)) else "diverged"
    if record is None or not record.attempts or not record.attempts[-1].failed:
        return "pending"
    return "diverged" if _given_up(config, events) else "failed"


def _finished(events: list[Event]) -> bool:
    """Whether the newest start came to the run's end."""
    last = next((e for e in reversed(events) if e["event"] in ("start", "end")), {})
    return last.get("reason") == "finished"


def _given_up(config: RunConfig, events: list[Event]) -> bool:
    """Whether skipped updates or a spike that asked for a rollback were the last of a run."""
    kinds = ("step", "skip", "spike", "rollback", "start")
    last = next((e for e in reversed(events) if e["event"] in kinds), {})
    skipped = last.get("skipped_in_row", 0) >= config.health.max_skipped
    return skipped or last.get("action") == "rollback"


def _last(events: list[Event], kind: str) -> Event:
    return next((event for event in reversed(events) if event["event"] == kind), {})


def current_record(name: str, config: RunConfig, folder: Path) -> RunRecord | None:
    """The record of a run with this configuration; None if it is to start from the beginning.

    A run that ended before its first update (out of memory, say) may change; its record is dropped.

    Raises:
        UserError: the run has made updates with other settings; names the keys and both values.
    """
    record = read_record(folder)
    if record is None:
        return None
    try:
        old = RunConfig.model_validate(record.config)
    except ValidationError as error:
        raise UserError(
            f"{name}: its record holds a configuration that this version does not read "
            f"({error.error_count()} problems): choose another --output"
        ) from error
    found = [d for d in diff_configs(old, config) if not d[0].startswith(FREE_KEYS)]
    if not found:
        return record
    if not has_updates(folder):
        return None
    listed = "; ".join(f"{key}: {before} there, {now} here" for key, before, now in found)
    raise UserError(
        f"{name} was started with other settings ({listed}): give the same, choose another "
        f"--output, or remove {folder}"
    )


def last_line(log: Path) -> str:
    """The last line of a log that says something, that of an ``error:`` before others; or ""."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:500]
