"""Compressed text files, opened so that damage is noticed and the bytes read are hashed."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megalr.errors import UserError

BUFFER = 1 << 18


class HashingReader(io.RawIOBase):
    """A file read once from start to end, with the SHA-256 of everything that was read."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._digest = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = self._file.readinto(view) or 0
        self._digest.update(view[:count])
        self.bytes_read += count
        return count

    def finish(self) -> str:
        """Read the rest of the file; returns the SHA-256 of the whole file."""
        while self.read(BUFFER):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


def decompressed(raw: io.RawIOBase, path: Path) -> BinaryIO:
    """A buffered stream of the text of ``path``: gzip, zstandard or plain, by its suffix."""
    buffered = io.BufferedReader(raw, BUFFER)
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=buffered), BUFFER)
    if path.suffix == ".zst":
        import pyarrow

        # Arrow, because it raises on a truncated stream where zstandard's own reader just ends.
        return io.BufferedReader(
            pyarrow.CompressedInputStream(pyarrow.PythonFile(buffered, "r"), "zstd"), BUFFER
        )
    return buffered


@contextlib.contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn what the decompressors raise on a damaged file into one line that names it."""
    try:
        yield
    except EOFError:
        raise UserError(
            f"{path}: the compressed data ends too early, the file is truncated; fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip data ({error}); fetch the file again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except OSError as error:
        if path.suffix != ".zst" or error.errno is not None:
            raise
        raise UserError(
            f"{path}: damaged or truncated zstandard data ({error}); fetch the file again"
        ) from None
