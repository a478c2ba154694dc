"""Token files of other programs as input: Megatron's ``.bin``/``.idx`` and datatrove's ``.ds``.

datatrove: ``NAME.ds`` holds the ids as uint16 or uint32, ``NAME.ds.index`` the end of each document
in tokens as uint64, and ``NAME.ds.metadata`` begins with ``TOKENIZER|BYTES``, the size of an id
(absent in some versions; then it follows from the index).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalr.data.mapped_file import MappedFile
from megalr.data.megatron_index import IndexedShard
from megalr.errors import UserError
from megalr.files import sha256_of_file
from megalr.readers.documents import ReadReport
from megalr.readers.input_splits import InputSplit, input_kind
from megalr.readers.streams import damage_reported

TOKENS_AT_ONCE = 1 << 20
Documents = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]  # tokens, starts, lengths


class Vocabulary(Protocol):
    """The part of a tokenizer that ids are checked against."""

    path: Path
    vocab_size: int


class TokenReader:
    """Iterates over (ids, lengths) of batches of documents; ids concatenated, both int64.

    With ``eos_id`` every document that does not end in EOS gets it appended. Documents without
    a token are skipped and counted. Memory: one batch (1 Mi tokens) or the longest document. Raises
    UserError for files that contradict each other.
    """

    def __init__(
        self,
        input_split: InputSplit,
        vocabulary: Vocabulary,
        eos_id: int | None,
        report: ReadReport,
    ) -> None:
        self.input_split, self._vocabulary, self.report = input_split, vocabulary, report
        self._eos_id = eos_id

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        read = _megatron if input_kind(self.input_split.file) == "megatron" else _datatrove
        tokens, starts, lengths = read(self.input_split.file)
        self.report.records = len(lengths)
        self.report.empty = int((lengths == 0).sum())
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        batches = np.cumsum(lengths) // TOKENS_AT_ONCE
        first = 0
        while first < len(lengths):
            stop = int(np.searchsorted(batches, batches[first], side="right"))
            yield self._with_eos(tokens, starts[first:stop], lengths[first:stop])
            first = stop
        self.report.sha256 = sha256_of_file(self.input_split.file)

    def _with_eos(
        self, tokens: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pieces = [tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)]
        ids = np.concatenate(pieces).astype(np.int64)
        self._check_vocabulary(ids)
        if self._eos_id is None:
            return ids, lengths
        ends = np.cumsum(lengths)
        missing = ids[ends - 1] != self._eos_id
        return np.insert(ids, ends[missing], self._eos_id), lengths + missing

    def _check_vocabulary(self, ids: NDArray[np.int64]) -> None:
        vocab_size = self._vocabulary.vocab_size
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise UserError(
                f"{self.input_split.file}: was made with another tokenizer than "
                f"{self._vocabulary.path}: it holds id {wrong[0]}, outside its vocabulary of "
                f"{vocab_size}; give --tokenizer the one that made the file"
            )


def _megatron(path: Path) -> Documents:
    shard = IndexedShard(path.with_suffix(""))
    starts, lengths = shard.spans(np.arange(shard.num_documents, dtype=np.int64))
    return shard.tokens, starts, lengths


def _datatrove(path: Path) -> Documents:
    index = Path(f"{path}.index")
    if not index.is_file():
        raise UserError(f"{index}: no such file; it holds the document ends of {path.name}")
    with damage_reported(path):
        size, index_size = path.stat().st_size, index.stat().st_size
    if index_size % 8:
        raise UserError(f"{index}: {index_size} bytes are no multiple of 8; the file is damaged")
    ends = MappedFile(index).array("<u8", index_size // 8).astype(np.int64)
    if len(ends) and (int(ends.min()) < 0 or int(np.diff(ends).min(initial=0)) < 0):
        raise UserError(f"{index}: the document ends are not ascending; the file is damaged")
    lengths = np.diff(ends, prepend=0)
    count = int(ends[-1]) if len(ends) else 0
    itemsize = _datatrove_itemsize(path, size, count)
    if count * itemsize != size:
        raise UserError(
            f"{path}: {size} bytes, but its index describes {count} ids of {itemsize} bytes; the "
            f"files are damaged or do not belong together"
        )
    tokens = MappedFile(path).array("<u4" if itemsize == 4 else "<u2", count)
    return tokens, ends - lengths, lengths


def _datatrove_itemsize(path: Path, size: int, count: int) -> int:
    metadata = Path(f"{path}.metadata")
    if metadata.is_file():
        with damage_reported(metadata):
            text = metadata.read_text(encoding="utf-8", errors="replace").splitlines()
        itemsize = text[0].rpartition("|")[2] if text else ""
        if itemsize in ("2", "4"):
            return int(itemsize)
    return 4 if count and size == 4 * count else 2
