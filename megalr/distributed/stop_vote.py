"""The decision to stop, taken by all ranks together.

A signal may reach one rank only (the ``deepspeed`` launcher signals its processes one after the
other, each with up to 30 s to end), and a stop file is seen when a rank looks for it. A rank that
stopped alone would leave the others in a collective; so the ranks vote.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megalr.distributed.agreement import is_rank0, raise_on_any_rank
from megalr.distributed.signals import FAILED, StopRequest

STOP_FILE = "stop"
"""Name of the file in the run's folder that requests a stop."""

CHECK_SECONDS = 1.0
"""About how often the ranks vote."""

_STOP_FILE_SEEN = 1  # no stop signal has this number


class StopVote:
    """A vote of all ranks, about once a second, on whether any of them has a request to stop.

    A vote is one all-reduce of two numbers that the host waits for; a single rank needs none. The
    number of calls between two votes follows from the slowest rank's time, which is part of the
    vote, so every rank votes at the same calls. It starts at 1, at most doubles, and is 1 again
    after ``requested(now=True)``.

    Args:
        request: stop signals of this process.
        folder: the run's folder, where rank 0 looks for the stop file.
        device: where the collective lives.
        clock: seconds from any origin.

    Attributes:
        folder_is_ours: whether a stop file in the folder is meant for this job; set once the folder
            is locked.
        reason: name of the signal, or ``stop_file``; None until the ranks have agreed to stop.
    """

    def __init__(
        self,
        request: StopRequest,
        folder: Path,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.file = folder / STOP_FILE
        self.device = device
        self.folder_is_ours = False
        self.reason: str | None = None
        self._clock = clock
        self._every = 1
        self._calls = 0
        self._voted = clock()

    def requested(self, now: bool = False) -> bool:
        """Whether the run is to stop; the same answer on every rank.

        Every rank must make the same calls. Without ``now`` most of them only count; with it the
        ranks vote.

        Raises:
            AgreedError: the request of some rank holds an error; the same on all ranks.
        """
        if self.reason is not None:
            return True
        self._calls += 1
        if self._calls < self._every and not now:
            return False
        code, seconds = self._vote(self._clock() - self._voted)
        affordable = int(self._calls * CHECK_SECONDS / max(seconds, 1e-6))
        self._every = 1 if now else max(1, min(affordable, 2 * self._every))
        self._calls, self._voted = 0, self._clock()
        if code == _STOP_FILE_SEEN:
            self.reason = "stop_file"
        elif code == FAILED:
            raise_on_any_rank(self.request.error)
        elif code:
            self.reason = signal.Signals(code).name
        return self.reason is not None

    def acknowledge(self) -> None:
        """Remove the stop file, so that the run can be started again."""
        if not is_rank0() or not self.folder_is_ours:
            return
        try:
            self.file.unlink(missing_ok=True)
        except OSError as error:
            print(f"warning: {self.file}: {error.strerror}; remove it", file=sys.stderr, flush=True)

    def _vote(self, seconds: float) -> tuple[int, float]:
        """Largest request and longest time over the ranks."""
        code = self.request.signal
        # os.path.exists: an error of the file system counts as no file.
        if not code and self.folder_is_ours and is_rank0() and os.path.exists(self.file):
            code = _STOP_FILE_SEEN
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return code, seconds  # without waiting for the device
        vote = torch.tensor([float(code), seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        largest, longest = vote.tolist()
        return int(largest), longest
