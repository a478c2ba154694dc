"""Megatron's ``.bin``/``.idx`` pair, byte for byte, read through memory maps.

``PREFIX.bin`` holds the token ids of all documents, concatenated, nothing else. ``PREFIX.idx``
(little-endian, no padding):

====================  =======  =====================================================
offset                type     meaning
====================  =======  =====================================================
0                     9 bytes  ``MMIDIDX`` and two zero bytes
9                     uint64   version, 1
17                    uint8    dtype code (4 int32, 8 uint16; 1 to 5 and 8 can be read)
18                    uint64   S, number of sequences
26                    uint64   D, number of documents + 1
34                    int32    S lengths in tokens
34 + 4 S              int64    S byte offsets into the ``.bin``
34 + 12 S             int64    D document boundaries, counted in sequences: first 0, last S
====================  =======  =====================================================

Source: ``megatron/core/datasets/indexed_dataset.py`` of Megatron-LM.
"""

from __future__ import annotations

import bisect
import io
import os
import resource
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megalr.data.mapped_file import MappedFile
from megalr.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX"
HEADER = struct.Struct("<9sQBQQ")
INT32, INT64 = struct.Struct("<i"), struct.Struct("<q")
DTYPE_CODES: dict[int, type] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
Integers = NDArray[np.int64]
SEARCH_STEPS = 20
"""Documents that a search of one may look at before a copy of all their offsets is cheaper."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of the ids of a vocabulary: uint16 below 65,500 entries, else int32.

    A function of the vocabulary size alone, with the threshold of Megatron's writer.
    """
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def dtype_code(dtype: np.dtype) -> int:
    """The code of ``dtype`` in an ``.idx`` header."""
    return next(code for code, kind in DTYPE_CODES.items() if np.dtype(kind) == dtype)


def bin_path(prefix: str | Path) -> Path:
    """The file of the token ids of a shard."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of the lengths and offsets of a shard."""
    return Path(f"{prefix}.idx")


def allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files to at least ``count`` if that is permitted.

    Each memory map holds one descriptor; all of C4 is 1,032 shards and the usual soft limit 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise UserError(
            f"the data set needs {count} open files and the limit of this system is {hard}; "
            f"raise it (ulimit -Hn) or preprocess into fewer shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class IndexedShard:
    """One ``.bin``/``.idx`` pair, opened for reading.

    ``check="quick"`` compares magic, version, dtype code, both file sizes and the ends of the
    arrays: constant time. ``check="full"`` (default) also verifies every length, byte offset and
    document boundary: about 4 ms for 350,000 documents. In both cases :meth:`spans` verifies what
    it returns, so ids never come from outside the document they belong to.

    Raises UserError naming the file, what is wrong and the values seen.
    """

    def __init__(self, prefix: str | Path, check: Literal["quick", "full"] = "full") -> None:
        self.prefix = Path(prefix)
        self.idx, self.bin = idx_path(prefix), bin_path(prefix)
        self._files: dict[Path, MappedFile] = {}
        self._sizes: list[tuple[Callable[[], int], int, MappedFile]] = []  # short: read often
        try:
            sizes = self._size(self.idx), self._size(self.bin)
            # Not a map: it would hold a descriptor that packing never needs.
            with open(self.idx, "rb", buffering=0) as stream:
                self._read_header(stream, *sizes)
                self._check_ends(stream)
        except OSError as error:
            raise UserError(f"{self.prefix}: cannot be read ({error.strerror})") from None
        except struct.error:
            raise self._fail(self.idx, "became shorter while it was opened") from None
        if check == "full":
            self._check_arrays()

    def _fail(self, path: Path, problem: str) -> UserError:
        return UserError(f"{path}: {problem}; the file is damaged or incomplete, write it again")

    def _size(self, path: Path) -> int:
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a shard is a .bin and an .idx file") from None

    def _read_header(self, stream: io.FileIO, idx_bytes: int, bin_bytes: int) -> None:
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            raise self._fail(self.idx, f"only {len(header)} bytes, the header alone has 34")
        magic, version, code, self.num_sequences, boundaries = HEADER.unpack(header)
        if magic.startswith(OLD_MAGIC):
            raise UserError(
                f"{self.idx}: an index in the old format of fairseq and Megatron (TNTIDX), which "
                f"is not supported; preprocess the text with `megalr data`"
            )
        if magic != MAGIC:
            raise self._fail(self.idx, f"starts with {magic!r} and not with {MAGIC!r}")
        if version != 1:
            raise UserError(
                f"{self.idx}: index version {version}, only 1 is known; write the shard with a "
                f"Megatron-Core that writes version 1, or preprocess the text"
            )
        kind = np.dtype(DTYPE_CODES.get(code, np.float32))
        if kind.kind not in "iu":
            raise self._fail(self.idx, f"dtype code {code}, ids need 1 to 5 or 8")
        self.dtype: np.dtype = kind.newbyteorder("<")
        if boundaries < 1:
            raise self._fail(self.idx, "an empty array of document boundaries")
        self.num_documents = boundaries - 1
        expected = HEADER.size + 12 * self.num_sequences + 8 * boundaries
        if idx_bytes != expected:
            if idx_bytes == expected + self.num_sequences:
                raise UserError(
                    f"{self.idx}: a multimodal index ({self.num_sequences} bytes of modes at its "
                    f"end), which is not supported; give a data set of text alone"
                )
            raise self._fail(
                self.idx,
                f"{idx_bytes} bytes, but {self.num_sequences} sequences and "
                f"{self.num_documents} documents need {expected}",
            )
        if bin_bytes % self.dtype.itemsize:
            raise self._fail(
                self.bin, f"{bin_bytes} bytes are no multiple of the {self.dtype.itemsize}-byte ids"
            )
        self.num_tokens = bin_bytes // self.dtype.itemsize

    def _mapped(self, path: Path) -> MappedFile:
        """The file at ``path``, mapped when it is first needed."""
        if path not in self._files:
            file = self._files[path] = MappedFile(path)
            self._sizes.append((file.current_size, file.stamp.size, file))
        return self._files[path]

    def check_sizes(self) -> None:
        """UserError if a mapped file has become shorter; call it before reading."""
        for size_now, size, file in self._sizes:
            if size_now() < size:
                file.check_size()

    def _array(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        return self._mapped(self.idx).array(dtype, count, offset)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sequence, (S,)."""
        return self._array("<i4", HEADER.size, self.num_sequences)

    @cached_property
    def pointers(self) -> Integers:
        """Byte offset of each sequence in the ``.bin`` file, (S,)."""
        return self._array("<i8", HEADER.size + 4 * self.num_sequences, self.num_sequences)

    @cached_property
    def documents(self) -> Integers:
        """Document boundaries counted in sequences, (D,)."""
        return self._array("<i8", HEADER.size + 12 * self.num_sequences, self.num_documents + 1)

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All ids of the shard, (num_tokens,), mapped read-only."""
        return self._mapped(self.bin).array(self.dtype, self.num_tokens)

    def _check_ends(self, stream: io.FileIO) -> None:
        def at(offset: int, layout: struct.Struct) -> int:
            return int(layout.unpack(os.pread(stream.fileno(), layout.size, offset))[0])

        start = HEADER.size + 12 * self.num_sequences
        first, last = at(start, INT64), at(start + 8 * self.num_documents, INT64)
        end = 0
        if self.num_sequences:
            length = at(HEADER.size + 4 * (self.num_sequences - 1), INT32)
            end = at(start - 8, INT64) + length * self.dtype.itemsize
        if first != 0 or last != self.num_sequences:
            raise self._fail(
                self.idx,
                f"document boundaries run from {first} to {last}, expected 0 to "
                f"{self.num_sequences}",
            )
        if end != self.num_tokens * self.dtype.itemsize:
            raise self._fail(
                self.bin,
                f"{self.num_tokens * self.dtype.itemsize} bytes, but its index describes {end}",
            )

    def _check_arrays(self) -> None:
        if self.num_sequences and int(self.lengths.min()) < 0:
            worst = int(self.lengths.argmin())
            raise self._fail(self.idx, f"sequence {worst} has length {self.lengths[worst]}")
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
        if not np.array_equal(self.pointers, starts):
            wrong = int(np.flatnonzero(self.pointers != starts)[0])
            raise self._fail(
                self.idx,
                f"sequence {wrong} starts at byte {self.pointers[wrong]}, the lengths before it "
                f"add up to {starts[wrong]}",
            )
        steps = np.diff(self.documents)
        if len(steps) and int(steps.min()) < 0:
            wrong = int(steps.argmin())
            raise self._fail(
                self.idx,
                f"document {wrong} runs from sequence {self.documents[wrong]} back to "
                f"{self.documents[wrong + 1]}",
            )

    def spans(self, documents: Integers) -> tuple[Integers, Integers]:
        """First token and number of tokens of each document; both int64, shape of ``documents``.

        Every span is checked against its neighbours and the file, whatever was checked on opening.
        """
        first, last = self.documents[documents], self.documents[documents + 1]
        sound = (first >= 0) & (first <= last) & (last <= self.num_sequences)
        if not sound.all():
            wrong = int(documents[np.flatnonzero(~sound)[0]])
            raise self._fail(self.idx, f"boundaries of document {wrong} are out of order")
        size = self.num_tokens * self.dtype.itemsize

        def byte(sequence: Integers) -> Integers:
            if not self.num_sequences:
                return np.zeros_like(sequence)
            inside = np.minimum(sequence, self.num_sequences - 1)
            return np.where(sequence < self.num_sequences, self.pointers[inside], size)

        start, stop = byte(first), byte(last)
        sound = (start >= 0) & (start <= stop) & (stop <= size) & (start % self.dtype.itemsize == 0)
        # The usual index has one sequence per document: its length must span exactly these bytes.
        single = last - first == 1
        if self.num_sequences:
            held = self.lengths[np.minimum(first, self.num_sequences - 1)].astype(np.int64)
            sound &= ~single | (held * self.dtype.itemsize == stop - start)
        if not sound.all():
            place = int(np.flatnonzero(~sound)[0])
            raise self._fail(
                self.idx,
                f"document {int(documents[place])} spans bytes {int(start[place])} to "
                f"{int(stop[place])}, which contradicts its length or the {size} bytes of the .bin",
            )
        return start // self.dtype.itemsize, (stop - start) // self.dtype.itemsize

    @cached_property
    def _boundaries(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """First byte, number of tokens and first sequence of each document, one at a time.

        Single numbers of a memoryview cost a tenth of those of an array. These are not aligned (34
        + 4 S bytes come before), so that numpy would search a copy of the whole array.
        """
        if self.num_sequences == self.num_documents:  # one sequence per document
            starts, sizes, firsts = (
                array.view(np.uint8).data for array in (self.pointers, self.lengths, self.documents)
            )
            return starts.cast("q"), sizes.cast("i"), firsts.cast("q")
        tokens, counts = self.spans(np.arange(self.num_documents))
        return (tokens * self.dtype.itemsize).data, counts.data, range(self.num_documents + 1)

    def documents_before(self, tokens: Integers) -> Integers:
        """Number of documents whose first token comes before each token; int64, (n,)."""
        places, starts = tokens * self.dtype.itemsize, self._boundaries[0]
        if len(places) * SEARCH_STEPS > self.num_documents:
            return np.searchsorted(np.asarray(starts, np.int64), places)
        return np.array([bisect.bisect_left(starts, place) for place in places.tolist()], np.int64)

    def starts_inside(self, first: int, count: int) -> list[int]:
        """First tokens of the documents that start inside of ``count`` tokens from ``first`` on.

        Raises UserError if one of these documents, or the one before, is empty or does not end
        where the next one starts.
        """
        starts, sizes, firsts = self._boundaries
        itemsize = self.dtype.itemsize
        begin, end = first * itemsize, (first + count) * itemsize
        number = bisect.bisect_right(starts, begin) - 1
        place, found = starts[number], []
        sound = place <= begin
        while sound:
            stop = place + sizes[number] * itemsize
            number += 1
            last = number == self.num_documents
            behind = self.num_tokens * itemsize if last else starts[number]
            sound = place < stop == behind and firsts[number] == number
            if stop >= end:
                break
            found.append(stop // itemsize)
            place = stop
            sound = sound and not last
        if not sound:
            raise self._fail(
                self.idx,
                f"document {number - 1}, from byte {place} on, is empty, or contradicts its length "
                "or the next one",
            )
        return found

    def sizes(self, documents: Integers) -> Integers:
        """Number of tokens of each document, without the checks of :meth:`spans`."""
        if self.num_sequences == self.num_documents:  # one sequence per document
            return self.lengths[documents].astype(np.int64)
        return self.spans(documents)[1]

    def document(self, number: int) -> NDArray[Any]:
        """The ids of one document, mapped read-only."""
        if not 0 <= number < self.num_documents:
            raise UserError(f"{self.prefix}: no document {number}, it has {self.num_documents}")
        start, count = self.spans(np.array([number], np.int64))
        return self.tokens[int(start[0]) : int(start[0] + count[0])]
