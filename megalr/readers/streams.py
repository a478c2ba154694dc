"""Text files, compressed or not: opened, hashed, and their damage or other format named."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megalr.errors import UserError
from megalr.files import system_message

BUFFER = 1 << 18
ZSTD_CHUNK = 1 << 15  # compressed bytes at a time: bounds the text of a very repetitive file
REASON_LENGTH = 200  # characters of a library's message that are shown
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MAGICS = {
    b"\x1f\x8b": "gzip data: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "zstandard data: add .zst to its name",
    b"PAR1": "a Parquet file: name it .parquet",
    b"ARROW1": "an Arrow file: name it .arrow",
    b"BZh": "bzip2 data: decompress it first",
    b"\xfd7zXZ": "xz data: decompress it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
}
_NUL_SHARE = 0.2  # of the bytes of Latin text in UTF-16 one half, in UTF-8 none


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


class _ZstdReader(io.RawIOBase):
    """The text of zstandard frames; raises EOFError where the last frame is truncated.

    zstandard's own stream reader ends without an error there, and Arrow's refuses windows above
    128 MiB (``zstd --long=28`` and more). Memory: the window that the file states, at most 2 GiB.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._frame: Any = None  # None between two frames
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        while not self._output:
            self._input = self._input or self._source.read(ZSTD_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = _zstd_decompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(view), len(self._output))
        view[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _zstd_decompressor() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31)


def decompressed(raw: io.RawIOBase, path: Path) -> BinaryIO:
    """A buffered stream of the text of ``path``: gzip, zstandard or plain, by its suffix."""
    buffered = io.BufferedReader(raw, BUFFER)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=buffered), BUFFER)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(buffered), BUFFER)
    return buffered


@contextlib.contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn the readers' exceptions on a damaged or unreadable file into one line that names it."""
    import pyarrow
    import zstandard

    try:
        yield
    except EOFError:
        raise UserError(
            f"{path}: the compressed data ends too early, the file is truncated; fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip data ({error}); fetch the file again") from None
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstandard data ({error}); fetch the file again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise UserError(f"{path}: cannot be read ({system_message(error)})") from None
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        raise UserError(f"{path}: damaged or truncated ({reason}); fetch the file again") from None


def foreign_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 if a file beginning with ``head`` is in that encoding; else None."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    if any(head.startswith(magic) for magic in _MAGICS):  # short ones may have many NULs
        return None
    return "UTF-16" if head.count(0) > _NUL_SHARE * len(head) else None


def likely_format(head: bytes) -> str | None:
    """The format of a file beginning with ``head`` that is no JSON lines, and what to do."""
    for magic, meaning in _MAGICS.items():
        if head.startswith(magic):
            return meaning
    start = head.strip()
    if start.startswith(b"["):
        return "a JSON array: write one object per line (jq -c '.[]')"
    if start == b"{":
        return "JSON over several lines: write one object per line (jq -c .)"
    return None
