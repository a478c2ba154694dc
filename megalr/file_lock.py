"""One job at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from megalr.errors import UserError
from megalr.files import disk_errors

GUARD_NAME = ".lock"


class JobLock:
    """Held by share ``share`` of ``shares`` of a job while it writes into ``folder``.

    Several shares of one division may run at once (a SLURM array); a second job on the same share,
    or one with another division, is refused with the name of the first. The system releases the
    lock when the process ends, also when it is killed. Works across nodes where the file system
    supports POSIX locks (NFS 4, Lustre with ``flock``, GPFS, BeeGFS).
    """

    def __init__(self, folder: Path, share: int = 0, shares: int = 1) -> None:
        self._folder = folder
        self.name = f"{share}-of-{shares}"
        self._file: IO[str] | None = None
        with disk_errors(folder), open(folder / GUARD_NAME, "a+") as guard:
            lock_file(guard, wait=True)  # two jobs that start together check one after the other
            self._file = self._acquire(shares)

    def _acquire(self, shares: int) -> IO[str]:
        own = self._folder / f"{GUARD_NAME}-{self.name}"
        for path in sorted(self._folder.glob(f"{GUARD_NAME}-*-of-*")):
            if path != own and path.name.endswith(f"-of-{shares}"):
                continue  # another share of this job
            with open(path, "a+") as other:
                if not lock_file(other):
                    other.seek(0)
                    raise UserError(
                        f"{self._folder}: another job is writing here: {other.read().strip()}; "
                        f"wait for it, end it, or choose another output folder"
                    )
        file = open(own, "a+")  # noqa: SIM115
        lock_file(file)
        file.truncate(0)
        os.write(file.fileno(), describe_process().encode())  # nothing buffered on a full disk
        return file

    def release(self) -> None:
        """Give the lock up and remove its file."""
        if self._file is not None:
            (self._folder / f"{GUARD_NAME}-{self.name}").unlink(missing_ok=True)
            self._file.close()
            self._file = None


def lock_file(file: IO[str], wait: bool = False) -> bool:
    """Take the exclusive lock of an open file; False if another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise UserError(
            f"{file.name}: this file system cannot lock files ({error.strerror}), so two jobs "
            f"could write over each other; choose an output folder on another one"
        ) from None
    return True


def describe_process() -> str:
    """One line that names this process, its host, its SLURM job and the time."""
    job = os.environ.get("SLURM_JOB_ID")
    slurm = f", SLURM job {job}" if job else ""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}{slurm}, started {started}\n"
