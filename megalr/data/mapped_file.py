"""Files mapped read-only, and whether they have changed since they were opened."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalr.errors import UserError


class FileStamp(NamedTuple):
    """Size in bytes and time of the last change of a file."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """The stamp in the result of ``os.stat`` or ``os.fstat``."""
        return cls(status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.mtime_ns / 1e9))
        return f"{self.size} bytes of {changed}"


class MappedFile:
    """The bytes of a file as arrays, without reading it.

    Reading a page behind the end of a file that was truncated meanwhile kills the process (SIGBUS);
    :meth:`check_size` before a read turns that into an error, but for a truncation between the two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None  # an empty file cannot be mapped
        self.current_size: Callable[[], int] = lambda: 0  # one system call, no look at the path
        try:
            with open(path, "rb") as stream:
                self.stamp = FileStamp.of(os.fstat(stream.fileno()))
                if self.stamp.size:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                    self.current_size = self._map.size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def array(self, dtype: Any, count: int, offset: int = 0) -> NDArray[Any]:
        """``count`` values of ``dtype`` starting ``offset`` bytes into the file."""
        end = offset + count * np.dtype(dtype).itemsize
        if end > self.stamp.size:
            raise UserError(
                f"{self.path}: {self.stamp.size} bytes, {end} were expected; the file was changed"
            )
        if self._map is None or count == 0:
            return np.empty(0, dtype)
        return np.frombuffer(self._map, dtype, count, offset)

    def check_size(self) -> None:
        """UserError if the file has become shorter."""
        if (size := self.current_size()) < self.stamp.size:
            raise UserError(
                f"{self.path}: was truncated to {size} bytes while in use, it had "
                f"{self.stamp.size}; {_ADVICE}"
            )


_ADVICE = (
    "a data set must not be changed while a run uses it: restore it, then start the same command "
    "again"
)


def check_stamp(path: str | Path, expected: FileStamp) -> None:
    """UserError unless the file at ``path`` has the expected size and time."""
    try:
        found = FileStamp.of(os.stat(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} while in use; {_ADVICE}") from None
    if found != expected:
        raise UserError(f"{path}: was changed while in use: {expected} became {found}; {_ADVICE}")
