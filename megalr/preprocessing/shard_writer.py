"""Writing a ``.bin``/``.idx`` pair as a stream, in constant memory, atomically."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.data.megatron_index import HEADER, MAGIC, bin_path, dtype_code, idx_path, token_dtype
from megalr.errors import UserError
from megalr.files import HashingWriter, disk_errors, publish_file, temporary_path

BLOCK = 1 << 18  # sequences of the index handled at a time


@dataclass(frozen=True)
class WrittenShard:
    """What a finished pair holds: counts, sizes in bytes, SHA-256 of both files."""

    documents: int
    tokens: int
    max_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes documents to ``PREFIX.bin`` and, on :meth:`finish`, ``PREFIX.idx``.

    Both files have temporary names until they are complete and synced; the ``.bin`` is renamed
    first and the ``.idx`` last, so an ``.idx`` never describes tokens that are not there. The
    lengths go to a side file, not into a list: memory does not grow with the number of documents.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, job: str = "single") -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.documents = self.tokens = 0
        self.max_id = -1
        self._job = job
        self._bin = HashingWriter(bin_path(prefix), job)
        self._lengths = temporary_path(Path(f"{prefix}.lengths"), job)
        with disk_errors(self._lengths):
            self._lengths_stream = open(self._lengths, "wb")  # noqa: SIM115

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int32]) -> None:
        """Append documents: their ids concatenated, and how many ids each has.

        Raises UserError for an id that the vocabulary does not have.
        """
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    f"{self.prefix}: the tokenizer returned id {low if low < 0 else high}, outside "
                    f"its vocabulary of {self.vocab_size}; its files do not belong together"
                )
            self.max_id = max(self.max_id, high)
        self._bin.write(ids.astype(self.dtype.newbyteorder("<")).tobytes())
        with disk_errors(self._lengths):
            self._lengths_stream.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def finish(self) -> WrittenShard:
        """Sync and publish both files."""
        self._bin.sync()
        with disk_errors(self._lengths):
            self._lengths_stream.close()
        index = HashingWriter(idx_path(self.prefix), self._job)
        try:
            self._write_index(index)
            index.sync()
        except BaseException:
            index.discard()
            raise
        publish_file(self._bin.temporary, self._bin.path)
        publish_file(index.temporary, index.path)
        self._lengths.unlink()
        return WrittenShard(
            self.documents,
            self.tokens,
            self.max_id,
            self._bin.size,
            index.size,
            self._bin.sha256,
            index.sha256,
        )

    def _write_index(self, index: HashingWriter) -> None:
        count = self.documents
        index.write(HEADER.pack(MAGIC, 1, dtype_code(self.dtype), count, count + 1))
        with open(self._lengths, "rb") as stream:
            while block := stream.read(4 * BLOCK):
                index.write(block)
        offset = 0
        with open(self._lengths, "rb") as stream:
            while block := stream.read(4 * BLOCK):
                ends = np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * self.dtype.itemsize
                starts = np.empty_like(ends)
                starts[0], starts[1:] = 0, ends[:-1]
                index.write((starts + offset).tobytes())
                offset += int(ends[-1])
        for first in range(0, count + 1, BLOCK):
            index.write(np.arange(first, min(first + BLOCK, count + 1), dtype="<i8").tobytes())

    def discard(self) -> None:
        """Delete what was written (after an error)."""
        self._bin.discard()
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._lengths_stream.close()
        self._lengths.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.discard()
