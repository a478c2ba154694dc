"""Output of a run: metrics.jsonl, TensorBoard, Weights & Biases, lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megalr.errors import UserError
from megalr.run.folder import METRICS
from megalr.run.tensorboard_log import TensorBoardLog
from megalr.run.terminal import Terminal
from megalr.run.wandb_log import WandbLog


class MetricsWriter:
    """Writes the events of a run; on ranks other than 0 every call does nothing.

    ``metrics.jsonl`` holds one JSON object per line: ``event``, ``update`` (updates done), ``time``
    (Unix seconds) and the event's numbers, whose names carry their unit. A line is written at once
    and flushed, so that a killed run leaves whole lines, except perhaps the last.

    Args:
        folder: the run's folder.
        active: whether this rank writes.
        total_updates: length of the run, for the terminal.
        tensorboard: also write for TensorBoard.
        wandb_project: also send the numbers of ``step``, ``eval``, ``eval_further`` and
            ``restart`` events to this Weights & Biases project, those of a further validation
            set under ``eval_NAME``; None: do not.
        config: resolved configuration.
        on_failure: called with the error when an event cannot be written, for the ranks to stop
            together; None: it is raised. No event is written after a failure.

    Raises:
        UserError: Weights & Biases is requested but not installed; the files cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        active: bool,
        total_updates: int,
        tensorboard: bool,
        wandb_project: str | None,
        config: dict[str, Any],
        on_failure: Callable[[UserError], None] | None = None,
    ) -> None:
        self.active = active
        self._on_failure = on_failure
        self._failed = False
        self._folder = folder
        self._file: TextIO | None = None
        self._board: TensorBoardLog | None = None
        self._wandb: WandbLog | None = None
        if not active:
            return
        with _one_line(folder):
            path = folder / METRICS
            _drop_unfinished_line(path)
            self._file = path.open("a", encoding="utf-8")
            if tensorboard:
                self._board = TensorBoardLog(folder, config)
            if wandb_project is not None:
                self._wandb = WandbLog(wandb_project, folder, config)
        self._terminal = Terminal(sys.stdout, folder, total_updates, config)

    def write(self, event: str, update: int, **numbers: Any) -> None:
        """Record one event and show it on the terminal.

        Raises:
            UserError: the disk refuses, and there is no ``on_failure``.
        """
        if self._file is None or self._failed:
            return
        record = {"event": event, "update": update, "time": round(time.time(), 3), **numbers}
        try:
            with _one_line(self._folder):
                self._file.write(json.dumps(record, allow_nan=True) + "\n")
                self._file.flush()
                self._copy(event, update, numbers)
        except UserError as error:
            self._failed = True
            if self._on_failure is None:
                raise
            self._on_failure(error)
        with contextlib.suppress(OSError):  # a full disk or a closed pipe: metrics.jsonl has it
            self._terminal.show(event, update, numbers)

    def _copy(self, event: str, update: int, numbers: dict[str, Any]) -> None:
        """Write the numbers of an event to TensorBoard and Weights & Biases."""
        if self._board is not None:
            self._board.write(event, update, numbers)
        if self._wandb is None or event not in ("step", "eval", "eval_further", "restart"):
            return
        if event == "eval_further":
            event = f"eval_{numbers['validation']}"
        kinds = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        self._wandb.write(update, {f"{event}/{k}": v for k, v in kinds.items()})

    def close(self) -> None:
        """Flush and close everything; idempotent."""
        for output in (self._file, self._board):
            if output is not None:
                # write() has reported a full disk
                with contextlib.suppress(OSError):
                    output.close()
        if self._wandb is not None:
            self._wandb.close()
        self._file = self._board = self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Report an error of writing metrics as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"metrics in run.dir {folder} could not be written ({error.strerror or error}): free "
            "space or fix the path and start again; the checkpoints are whole"
        ) from error


def _drop_unfinished_line(path: Path) -> None:
    """Remove a last line that a killed run left unfinished, so that every line is JSON."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
