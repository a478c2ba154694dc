"""Ends a run that makes no progress, after writing the stacks of all threads of every rank."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil

STALLED = 3
"""Exit code of a process that its watchdog ended."""

STACKS = "stacks"
"""Folder inside the run's where the stacks are written, one file per rank."""

PEER_SECONDS = 5.0
"""How long a rank waits after its dump: launchers kill the others as soon as one has ended."""

OWN_READS = 4096
"""Bytes that reading the counters may itself read; more is progress."""


class Watchdog:
    """A thread that expects :meth:`progress` at least every ``seconds``; use it in a ``with``.

    Ranks stall together, in the same collective or waiting for it, and each has its own watchdog:
    all of them write their stacks, to ``<folder>/stacks/rank-N.txt`` and to standard error, before
    they end with exit code 3.

    Args:
        seconds: longest time without progress; 0 = no thread, nothing happens.
        folder: the run's folder.
        rank: of this process, for the file's name.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self.seconds = seconds
        self.file = folder / STACKS / f"rank-{rank}.txt"
        self.rank = rank
        self._last = time.monotonic()
        self._doing = "start"
        self._transferring = False
        self._bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="Watchdog", daemon=True)

    def progress(self, doing: str) -> None:
        """Record progress; ``doing`` describes what follows, for the message of a stall."""
        self._last, self._doing = time.monotonic(), doing

    @contextmanager
    def transferring(self, doing: str) -> Iterator[None]:
        """A context in which bytes that this process reads or writes are progress too: saving and
        loading are one call each."""
        self.progress(doing)
        self._transferring = True
        try:
            yield
        finally:
            self._transferring = False
            self.progress("after " + doing)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(min(self.seconds / 10, 5.0)):
            if self._transferring:
                counters = process.io_counters()
                moved = counters.read_chars + counters.write_chars
                if moved - self._bytes > OWN_READS:
                    self._last = time.monotonic()
                self._bytes = moved
            if time.monotonic() - self._last > self.seconds:
                self._end()

    def _end(self) -> None:
        line = (
            f"rank {self.rank} has made no progress for {self.seconds:g} s (health.stall_seconds) "
            f"{self._doing}: stacks of its threads are in {self.file}"
        )
        print(f"error: {line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # The file comes second: it may be the file system that hangs.
        writer = threading.Thread(target=self._write, args=(line,), daemon=True)
        writer.start()
        writer.join(PEER_SECONDS)
        time.sleep(PEER_SECONDS)
        os._exit(STALLED)

    def _write(self, line: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self.progress("start")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self.seconds > 0:
            self._thread.join()
