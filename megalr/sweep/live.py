"""Progress of a sweep: a table that renews itself on a terminal, else a line per ended run."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from megalr.sweep.results import Results, Row
from megalr.sweep.runner import RunningRun

REDRAW_SECONDS = 1.0


class LiveTable:
    """What a sweep shows while it runs.

    Args:
        results: the rows, kept up to date by the caller.
        total: runs that this call will run.
        slots: runs at a time.
        stream: where to; a terminal gets the table.
    """

    def __init__(
        self, results: Results, total: int, slots: int, stream: TextIO = sys.stdout
    ) -> None:
        self.results, self.total, self.slots, self.stream = results, total, slots, stream
        self.started = time.monotonic()
        self.ended = 0
        self._drawn = 0
        self._last = 0.0

    def end_of(self, row: Row) -> None:
        """A run has ended: one line about it, unless it was stopped and goes on later."""
        self._erase()
        if row["status"] == "pending":
            return
        self.ended += 1
        print(f"{self.ended}/{self.total} {result_line(row)}; {self._eta()}", file=self.stream)
        self.stream.flush()

    def redraw(self, running: Sequence[RunningRun]) -> None:
        """Renew the table, about once a second; nothing where there is no terminal."""
        if not self.stream.isatty() or time.monotonic() - self._last < REDRAW_SECONDS:
            return
        self._last = time.monotonic()
        self._erase()
        width = shutil.get_terminal_size().columns - 1
        lines = [text[:width] for text in self._lines(running)]
        self.stream.write("".join(f"{line}\n" for line in lines))
        self.stream.flush()
        self._drawn = len(lines)

    def _lines(self, running: Sequence[RunningRun]) -> list[str]:
        counts = [f"{self.results.count(s)} {s}" for s in ("finished", "diverged", "failed")]
        pending = self.results.count("pending") - len(running)
        lines = [f"{', '.join(counts)}, {len(running)} running, {pending} waiting; {self._eta()}"]
        for item in running:
            seconds = time.monotonic() - item.started
            gpu = "" if item.slot.gpu is None else f"GPU {item.slot.gpu}  "
            lines.append(f"  {seconds:6.0f} s  {gpu}{item.run.name}")
        for group, row in best_rows(self.results.rows.values()).items():
            lines.append(f"  best of {group}: {result_line(row)}")
        return lines

    def _eta(self) -> str:
        if not self.ended or self.ended == self.total:
            return f"{time.monotonic() - self.started:.0f} s"
        left = (time.monotonic() - self.started) / self.ended * (self.total - self.ended)
        return f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"

    def _erase(self) -> None:
        if self._drawn:
            self.stream.write(f"\033[{self._drawn}F\033[J")
            self._drawn = 0


def result_line(row: Row) -> str:
    """A run's result in one line."""
    if row["status"] == "finished":
        return f"{row['run']}: perplexity {float(row['perplexity'] or math.nan):.3f}"
    return f"{row['run']}: {row['status']}" + (f" ({row['error']})" if row["error"] else "")


def best_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """The finished run with the lowest perplexity of each group."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["status"] != "finished" or row["perplexity"] in (None, ""):
            continue
        held = best.get(row["group"])
        if held is None or float(row["perplexity"]) < float(held["perplexity"]):
            best[row["group"]] = row
    return best
