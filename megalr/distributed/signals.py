"""Stop requests that reach a process as signals.

Imports the standard library and errors only, so that a command line can install the handlers
before its slow imports.
"""

from __future__ import annotations

import signal
from types import FrameType

from megalr.errors import UserError

STOPPED = 75
"""Exit code of a run that was stopped on request after saving (EX_TEMPFAIL): start it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that request a stop: schedulers and launchers send the first, users the second."""

FAILED = 1 << 16
"""Stands for an error in :attr:`StopRequest.signal`; above the numbers of all signals."""


class StopRequest:
    """Whether this process has received a stop signal, or an error of its own that ends the run.

    Attributes:
        signal: number of the first stop signal received; 0 before any; FAILED after an error.
        error: the error; None without one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.error: UserError | None = None

    def fail(self, error: UserError) -> None:
        """Have all ranks raise this error at their next vote; raised here it would strand them."""
        self.signal = FAILED
        self.error = self.error or error

    def listen(self) -> StopRequest:
        """Record :data:`STOP_SIGNALS` from now on instead of being killed by them; returns self.

        Main thread only. The handler only stores the first signal; the run polls it where it can
        stop. Further signals have no effect.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._record)
            # Native libraries may not handle interrupted system calls.
            signal.siginterrupt(number, False)
        return self

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number
