"""Files that are either complete or absent, and checksums of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megalr.errors import UserError

LONGEST_NAME = 255  # bytes, on the usual file systems
CHUNK = 1 << 20  # bytes read at a time when a file is hashed
LARGEST_JSON = 1 << 26  # bytes of a JSON file that read_json_object parses


def temporary_path(path: Path, job: str) -> Path:
    """Name under which job ``job`` writes ``path``: same folder, so that a rename is atomic."""
    name = path.name
    if len(os.fsencode(name)) + len(job) > LONGEST_NAME - len("...partial"):
        name = f"{name[:80]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{job}.partial")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors while writing (disk full, no permission, ...) into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"{path}: no space left on the disk while writing; nothing unfinished counts as "
                f"finished: free some space and start the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{path}: cannot write ({error.strerror}); choose another output folder"
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"{path}: is a file where a folder is needed; choose another"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"{path}: the name is too long for this file system; choose a shorter one"
            ) from error
        raise UserError(f"{path}: cannot write ({system_message(error)})") from error


class DiskFull(UserError):
    """The output disk is full: the whole job stops, not only the current file."""


def publish_file(temporary: Path, path: Path) -> None:
    """Give a completely written and synced file its final name, durably."""
    with disk_errors(path):
        _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, content: bytes, job: str = "single") -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    with disk_errors(path):
        replace_file(path, content, job)


def replace_file(path: Path, content: bytes, job: str = "single") -> None:
    """As :func:`write_atomic`, but raises OSError."""
    temporary = temporary_path(path, job)
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _publish(temporary, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most LARGEST_JSON bytes, read strictly.

    Raises:
        UserError: the file is missing, too large, nested too deeply, not JSON (NaN and Infinity are
            not), gives a key twice, or holds something other than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        with open(path, "rb") as stream:
            content = stream.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise UserError(f"{path}: larger than {LARGEST_JSON >> 20} MiB; copy the file again")
        value = json.loads(
            content, object_pairs_hook=_distinct_keys, parse_constant=_refuse_constant
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except RecursionError:
        raise UserError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # also bytes that are not UTF-8, integers of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy the file again")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def sha256_of_file(path: Path, start: int = 0, stop: int | None = None) -> str:
    """Hexadecimal SHA-256 of the bytes ``[start, stop)`` of a file, read in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        stream.seek(start)
        left = (os.fstat(stream.fileno()).st_size if stop is None else stop) - start
        while left > 0 and (block := stream.read(min(CHUNK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class HashingWriter:
    """A file being written under a temporary name, with size and SHA-256 of its content."""

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        self.temporary = temporary_path(path, job)
        self.size = 0
        self._digest = hashlib.sha256()
        with disk_errors(path):
            self._stream: BinaryIO = open(self.temporary, "wb", buffering=CHUNK)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        with disk_errors(self.path):
            self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Flush to the disk and close; the file still has its temporary name."""
        with disk_errors(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    def discard(self) -> None:
        """Close and delete the temporary file."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._stream.close()
        self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Turn the system's errors into UserErrors without a path, for code of one rank; the caller
    adds the path."""
    try:
        yield
    except OSError as error:
        raise UserError(system_message(error)) from error


def system_message(error: Exception) -> str:
    """The operating system's description of an error; torch raises a RuntimeError for a write."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
