"""Requests to stop that reach a process as signals.

Nothing but the standard library is imported here, so that a command line can listen before it
imports what takes seconds.
"""

from __future__ import annotations

import signal
from types import FrameType

STOPPED = 75
"""Exit code of a run that was stopped on request after saving (EX_TEMPFAIL): start it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop: schedulers and launchers send the first, users the second."""


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: number of the first signal that came, 0 as long as none has.
    """

    def __init__(self) -> None:
        self.signal = 0

    def listen(self) -> StopRequest:
        """Take note of :data:`STOP_SIGNALS` from now on instead of dying of them; returns self.

        Only the main thread may call it. The handler does nothing but remember the first signal:
        the run looks at it where it can stop, and further signals change nothing.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
            # Libraries below Python need not be ready for system calls that a signal cuts short.
            signal.siginterrupt(number, False)
        return self

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number
