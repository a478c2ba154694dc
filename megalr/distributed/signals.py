"""Stop requests that reach a process as signals.

Imports only the standard library, so that a command line can install the handlers before its slow
imports.
"""

from __future__ import annotations

import signal
from types import FrameType

STOPPED = 75
"""Exit code of a run that was stopped on request after saving (EX_TEMPFAIL): start it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that request a stop: schedulers and launchers send the first, users the second."""


class StopRequest:
    """Whether this process has received a stop signal.

    Attributes:
        signal: number of the first stop signal received; 0 before any.
    """

    def __init__(self) -> None:
        self.signal = 0

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
