"""Output of a run: metrics.jsonl, TensorBoard, Weights & Biases, lines on the console."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from megalr.errors import UserError
from megalr.run.folder import METRICS
from megalr.run.wandb_log import WandbLog


class MetricsWriter:
    """Writes the events of a run; on ranks other than 0 every call does nothing.

    ``metrics.jsonl`` holds one JSON object per line: ``event``, ``update`` (updates done), ``time``
    (Unix seconds) and the event's numbers, whose names carry their unit. A line is written at once
    and flushed, so that a killed run leaves whole lines, except perhaps the last.

    Args:
        folder: the run's folder.
        active: whether this rank writes.
        total_updates: length of the run, for the progress bar.
        tensorboard: also write the numbers of ``step``, ``eval``, ``eval_further`` and ``restart``
            events there, those of a further validation set under ``eval_NAME``.
        wandb_project: also send them to this Weights & Biases project; None: do not.
        config: resolved configuration, for Weights & Biases.
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
        self._board: Any = None
        self._wandb: WandbLog | None = None
        self._bar: tqdm | None = None
        if not active:
            return
        with _one_line(folder):
            path = folder / METRICS
            _drop_unfinished_line(path)
            self._file = path.open("a", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"))
            if wandb_project is not None:
                self._wandb = WandbLog(wandb_project, folder, config)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_updates, unit="update", dynamic_ncols=True)

    def write(self, event: str, update: int, **numbers: Any) -> None:
        """Record one event and show it on the console.

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
            self._show(event, update, numbers)

    def _copy(self, event: str, update: int, numbers: dict[str, Any]) -> None:
        """Write the numbers of an event to TensorBoard and Weights & Biases."""
        if event not in ("step", "eval", "eval_further", "restart"):
            return
        if event == "eval_further":
            event = f"eval_{numbers['validation']}"
        kinds = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        if self._board is not None:
            for key, value in kinds.items():
                self._board.add_scalar(f"{event}/{key}", value, update)
        if self._wandb is not None:
            self._wandb.write(update, {f"{event}/{k}": v for k, v in kinds.items()})

    def _show(self, event: str, update: int, numbers: dict[str, Any]) -> None:
        if self._bar is not None and event == "step":
            self._bar.n = update
            self._bar.set_postfix_str(_brief(numbers), refresh=True)
            return
        line = f"[{time.strftime('%H:%M:%S')}] {event} {update}: {_brief(numbers)}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Flush and close everything; idempotent."""
        for output in (self._file, self._board, self._bar):
            if output is not None:
                # write() has reported a full disk
                with contextlib.suppress(OSError):
                    output.close()
        if self._wandb is not None:
            self._wandb.close()
        self._file = self._board = self._bar = self._wandb = None

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


def _brief(numbers: dict[str, Any]) -> str:
    """Numbers and short strings on one line: ``loss 3.512  tokens_per_second 1.25e+06``."""
    parts = []
    for key, value in numbers.items():
        if isinstance(value, float):
            parts.append(f"{key} {value:.5g}")
        elif isinstance(value, int | str | bool):
            parts.append(f"{key} {value}")
    return "  ".join(parts)
