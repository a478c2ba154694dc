"""Progress of the whole job on one live line."""

from __future__ import annotations

import sys
import time
from typing import TextIO

LINE_SECONDS = 30.0  # between two lines when the output is no terminal
LIVE_SECONDS = 0.5


class ProgressLine:
    """Counts documents, text and tokens over all workers and shows their rates and the ETA.

    The ETA comes from the bytes of the input files, compressed as they are, that were read so far.
    """

    def __init__(self, files: int, input_bytes: int, stream: TextIO | None = None) -> None:
        self.files, self.input_bytes = files, input_bytes
        self.documents = self.text_bytes = self.tokens = 0
        self.consumed_bytes = self.finished = self.skipped_bytes = 0
        self.started = time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = 0.0 if self._live else self.started

    def add(self, documents: int, text_bytes: int, tokens: int, input_bytes: int) -> None:
        """Count work that was done."""
        self.consumed_bytes += input_bytes
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        self.show()

    def finish_split(self, input_bytes: int, reused: bool) -> None:
        """Count a finished input split; ``reused``: it was there already."""
        self.finished += 1
        self.skipped_bytes += input_bytes if reused else 0
        self.show()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def text(self) -> str:
        """The line."""
        seconds = self.seconds
        eta = "?"
        if self.consumed_bytes:
            left = self.input_bytes - self.skipped_bytes - self.consumed_bytes
            eta = _clock(seconds * max(left, 0) / self.consumed_bytes)
        return (
            f"{self.finished}/{self.files} files, {self.documents:,} documents "
            f"({self.documents / seconds:,.0f}/s), {self.text_bytes / 1e6:,.0f} MB "
            f"({self.text_bytes / 1e6 / seconds:.1f}/s), {self.tokens:,} tokens "
            f"({self.tokens / 1e6 / seconds:.2f} M/s), {_clock(seconds)} elapsed, {eta} left"
        )

    def show(self) -> None:
        """Print the line if it is time."""
        now = time.monotonic()
        if now - self._shown < (LIVE_SECONDS if self._live else LINE_SECONDS):
            return
        self._shown = now
        self._stream.write(f"\r\x1b[K{self.text()}" if self._live else f"{self.text()}\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """Print a line of its own above the live line."""
        self._stream.write(("\r\x1b[K" if self._live else "") + f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Show the final state."""
        self.message(self.text())


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
