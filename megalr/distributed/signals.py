"""Stop requests that reach a process as signals.

Imports the standard library and errors only, so that a command line can install the handlers
before its slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from megalr.errors import RANK_VARIABLES, UserError, launched_number

STOPPED = 75
"""Exit code of a run that was stopped on request after saving (EX_TEMPFAIL): start it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that request a stop: from schedulers and launchers, from users, from Ctrl-C."""

SAME_SECONDS = 1.0
"""A second SIGINT within this time is the same Ctrl-C, passed on by a launcher."""

STOPPING = "stopping: saves after the running update; Ctrl-C again ends at once, without saving\n"

FAILED = 1 << 16
"""Stands for an error in :attr:`StopRequest.signal`; above the numbers of all signals."""


class StopRequest:
    """Whether this process has received a stop signal, or an error of its own that ends the run.

    Args:
        clock: seconds from any origin.

    Attributes:
        signal: number of the first stop signal received; 0 before any; FAILED after an error.
        error: the error; None without one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal = 0
        self.error: UserError | None = None
        self._clock = clock
        self._interrupted: float | None = None

    def fail(self, error: UserError) -> None:
        """Have all ranks raise this error at their next vote; raised here it would strand them."""
        self.signal = FAILED
        self.error = self.error or error

    def listen(self) -> StopRequest:
        """Record :data:`STOP_SIGNALS` from now on instead of being ended by them; returns self.

        Main thread only. The handler only stores the first signal; the run polls it where it can
        stop. Further signals have no effect, except for a second Ctrl-C: KeyboardInterrupt.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._interrupt if number == signal.SIGINT else self._record)
            # Native libraries may not handle interrupted system calls.
            signal.siginterrupt(number, False)
        return self

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Record the first Ctrl-C, which rank 0 answers; the second ends the process."""
        now = self._clock()
        if self._interrupted is None:
            self._interrupted = now
            self._record(number, frame)
            if launched_number(RANK_VARIABLES) == 0:
                # Not print: the handler may interrupt one, whose buffer takes no second writer.
                with contextlib.suppress(OSError):
                    os.write(1, f"\n{STOPPING}".encode())
        elif now - self._interrupted > SAME_SECONDS:
            raise KeyboardInterrupt
