"""A lock on a run's folder: one job at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megalr.distributed.agreement import run_on_rank0
from megalr.errors import UserError
from megalr.file_lock import describe_process, lock_file
from megalr.run.folder import RUN_LOCK

OWN_JOB_SECONDS = 180.0
"""How long a requeued job waits for the lock of its previous start: the file system may take that
long to release the lock of a lost node."""

_POLL_SECONDS = 2.0


@contextmanager
def run_folder_lock(folder: Path) -> Iterator[None]:
    """Keep other jobs out of ``folder`` inside the ``with``. Collective.

    Rank 0 creates the folder if needed and locks a file in it. The system releases the lock when
    the process ends, however it ends. A folder that is still empty on exit is removed.

    Raises:
        AgreedError: another job uses the folder (its host, process and SLURM job are named), the
            folder cannot be written, or its file system cannot lock files.
    """
    held: list[IO[str]] = []
    run_on_rank0(lambda: held.append(_acquire(folder)))
    try:
        yield
    finally:
        for file in held:
            _release(folder, file)


def _acquire(folder: Path) -> IO[str]:
    job = os.environ.get("SLURM_JOB_ID")
    deadline = time.monotonic() + OWN_JOB_SECONDS
    while True:
        file = _open(folder)
        if lock_file(file):
            if _is_current(folder, file):
                break
            file.close()  # the previous job removed the file between open and lock
            continue
        file.seek(0)
        holder = file.read().strip()
        file.close()
        own = job is not None and f"SLURM job {job}," in holder
        if not own or time.monotonic() > deadline:
            raise UserError(
                f"run.dir {folder} is in use by another job: {holder}; wait for it, end it, or "
                "choose another run.dir"
            )
        time.sleep(_POLL_SECONDS)
    try:
        file.truncate(0)
        file.write(describe_process())
        file.flush()
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be written: {error.strerror}; free space or fix the path"
        ) from error
    return file


def _open(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / RUN_LOCK, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be written: {error.strerror}; fix the path or its permissions"
        ) from error


def _is_current(folder: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / RUN_LOCK))
    except FileNotFoundError:
        return False


def _release(folder: Path, file: IO[str]) -> None:
    with suppress(OSError):  # must not hide the error that ended the run
        (folder / RUN_LOCK).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    file.close()
