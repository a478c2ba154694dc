"""Token data sets: samples of one fixed length read from the shards of one or several sources."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.data.document_ends import (
    check_document_ends,
    count_starts,
    mark_starts,
    positions_in_documents,
)
from megalr.data.manifest import DataManifest, ShardEntry, TokenizerInfo
from megalr.data.mapped_file import FileStamp, check_stamp
from megalr.data.megatron_index import IndexedShard, allow_open_files, token_dtype
from megalr.data.shuffle import SampleOrder
from megalr.errors import UserError

Integers = NDArray[np.int64]
SAMPLES_ESTIMATED = 256  # that a mean over all samples is estimated from
CHECK_SECONDS = 5.0  # between two looks at the files of open shards
NO_TARGET = -100  # the label of a position without a target, as in torch's cross entropy


@dataclass(frozen=True)
class MixtureSource:
    """One data folder of a mixture, its samples ``[first, first + count)`` and its weight."""

    path: Path
    first: int
    count: int
    weight: Fraction | None


class _Shard:
    """A shard of the manifest; its files are opened when the first of its samples is read."""

    def __init__(
        self, folder: Path, entry: ShardEntry, dtype: np.dtype, stamps: Mapping[str, FileStamp]
    ) -> None:
        self.prefix = f"{folder}/{entry.name}"  # a thousand Path objects are slow to make
        self.entry = entry
        self._dtype = dtype
        self._stamps = stamps

    @property
    def opened(self) -> bool:
        """Whether a sample of the shard has been read."""
        return "files" in self.__dict__

    @cached_property
    def files(self) -> IndexedShard:
        self.check_unchanged()
        shard = IndexedShard(self.prefix, check="quick")
        found = (shard.num_documents, shard.num_tokens)
        if found != (self.entry.documents, self.entry.tokens):
            raise UserError(
                f"{self.prefix}.idx: {found[0]} documents and {found[1]} tokens, the manifest says "
                f"{self.entry.documents} and {self.entry.tokens}; the files do not belong together"
            )
        if shard.dtype != self._dtype:
            raise UserError(
                f"{self.prefix}.idx: ids are {shard.dtype.name}, a vocabulary of this size needs "
                f"{self._dtype.name}; the files do not belong together"
            )
        return shard

    def check_unchanged(self) -> None:
        """UserError if a file has another size or time than when the data set was opened."""
        for suffix in (".bin", ".idx"):
            path = self.prefix + suffix
            if path in self._stamps:
                check_stamp(path, self._stamps[path])


class TokenDataset:
    """Samples of ``sequence_length`` (S) positions.

    ``packing=True``: the targets of a shard of T tokens are its tokens 1 .. T-1. Sample i of the
    shard has the inputs ``[iS, iS + S)`` and the targets ``[iS + 1, iS + S + 1)``; the last one
    may be shorter and is padded. So every token but the first of a shard is a target exactly once
    an epoch, and a shard has ceil((T - 1) / S) samples. Windows cross document ends; EOS ids mark
    them.

    ``document_mask=True``, with packing only: the first token of a document is no target, since a
    document alone has none before it, and each sample also has the positions of its tokens within
    their documents, from 0. A document that began in an earlier window has position 0 at the first
    token of this one.

    ``packing=False``: sample i is document i, truncated to S ids of which the last is then EOS (if
    the documents were written with EOS), padded to S; a document of L ids has min(L, S) - 1
    targets.

    Padded inputs hold ``pad_id``, labels without a target -100. Samples are numbered through all
    shards of all sources in order.

    ``stamps`` are the sizes and times of the files when the data set was opened. A file that no
    longer has them is an error: when its shard is opened, and for open shards at the first read
    ``CHECK_SECONDS`` after the last check.
    """

    def __init__(
        self,
        manifests: Sequence[tuple[Path, DataManifest, tuple[ShardEntry, ...]]],
        sequence_length: int,
        packing: bool,
        weights: Sequence[Fraction] | None = None,
        stamps: Mapping[str, FileStamp] | None = None,
        document_mask: bool = False,
    ) -> None:
        if sequence_length < 2:
            raise UserError(f"data.sequence_length is {sequence_length}, it must be at least 2")
        self.sequence_length = sequence_length
        self.packing = packing
        self.document_mask = document_mask
        if document_mask:
            _check_document_mask(manifests, sequence_length, packing)
        self.tokenizer: TokenizerInfo = _common_tokenizer(manifests)
        self.append_eos: bool = manifests[0][1].append_eos
        self.tokenizer_path: Path = manifests[0][0] / self.tokenizer.path
        self._dtype = token_dtype(self.tokenizer.vocab_size)
        self._shards = [
            _Shard(folder, entry, self._dtype, stamps or {})
            for folder, _, entries in manifests
            for entry in entries
        ]
        allow_open_files(len(self._shards) * (1 if packing and not document_mask else 2) + 256)
        tokens = np.array([shard.entry.tokens for shard in self._shards], np.int64)
        documents = np.array([shard.entry.documents for shard in self._shards], np.int64)
        counts = -(-np.maximum(tokens - 1, 0) // sequence_length) if packing else documents
        self._tokens = tokens
        self._firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.num_samples = int(self._firsts[-1])
        self.num_tokens, self.num_documents = int(tokens.sum()), int(documents.sum())
        if self.num_samples == 0:
            split = self._shards[0].entry.split
            held_out = " or hold out a larger --validation_fraction" * (split == "validation")
            raise UserError(
                f"{manifests[0][0]}: no {split} sample in {len(self._shards)} shards with "
                f"{self.num_tokens} tokens; preprocess more text{held_out}"
            )
        ends = np.cumsum([len(entries) for _, _, entries in manifests])
        borders = [0, *(int(self._firsts[end]) for end in ends)]
        self.sources = tuple(
            MixtureSource(
                folder, borders[i], borders[i + 1] - borders[i], weights[i] if weights else None
            )
            for i, (folder, _, _) in enumerate(manifests)
        )
        for source in self.sources:
            if source.count == 0:
                raise UserError(f"{source.path}: this source of the mixture holds no sample")
        self._order = SampleOrder([source.count for source in self.sources], weights)
        self._next_check = time.monotonic() + CHECK_SECONDS

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer; every id of the data is below it."""
        return self.tokenizer.vocab_size

    @property
    def max_id(self) -> int:
        """The largest id that occurs in the data."""
        return max(shard.entry.max_id for shard in self._shards)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the number and the position of each sample."""
        content = {
            "tokenizer": self.tokenizer.fingerprint,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            **({"document_mask": True} if self.document_mask else {}),  # older ones lack the key
            "sources": [[s.first, s.count, str(s.weight)] for s in self.sources],
            "shards": [[s.entry.bin_sha256, s.entry.idx_sha256] for s in self._shards],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def sample_ids(self, positions: Integers, seed: int) -> Integers:
        """Numbers of the samples at these positions of the endless training order."""
        return self._order.sample_ids(positions, seed)

    def source_of(self, samples: Integers) -> Integers:
        """Index into :attr:`sources` of each sample."""
        borders = np.array([source.first for source in self.sources], np.int64)
        return np.searchsorted(borders, samples, side="right") - 1

    def count_targets(self, samples: Integers) -> Integers:
        """Number of targets of each sample, from the index alone; int64, shape of ``samples``."""
        result = np.empty(len(samples), np.int64)
        if self.packing:
            owner = np.searchsorted(self._firsts, samples, side="right") - 1
            start = (samples - self._firsts[owner]) * self.sequence_length
            result = np.minimum(self._tokens[owner] - 1 - start, self.sequence_length)
            if self.document_mask:
                for shard, rows, _ in self._by_shard(samples):
                    result[rows] -= count_starts(shard.files, start[rows], result[rows])
            return result
        for shard, rows, local in self._by_shard(samples):
            result[rows] = shard.files.sizes(local)
        return np.maximum(np.minimum(result, self.sequence_length) - 1, 0)

    def read(
        self, samples: Integers, out: Sequence[NDArray[Any]] | None = None
    ) -> Sequence[NDArray[Any]]:
        """Inputs and labels of the given samples, int64 (n, S); written to ``out`` if given.

        With ``document_mask`` also the positions, int32 (n, S), as the third array. Raises
        UserError for an id outside the vocabulary and for damaged files.
        """
        if time.monotonic() >= self._next_check:
            self.check_unchanged()
        n, length = len(samples), self.sequence_length
        tokens = np.full((n, length + 1), self.pad_id, self._dtype)
        used = np.empty(n, np.int64)  # ids of each row, inputs and last target together
        starts = np.zeros((n, length + 1), np.int32)  # places where documents start
        for shard, rows, local in self._by_shard(samples):
            read = self._read_windows if self.packing else self._read_documents
            used[rows] = read(shard.files, local, rows, tokens)
            if self.document_mask:
                mark_starts(shard.files, local * length, used[rows], rows, starts)
        if n and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise self._wrong_id(samples, tokens)
        if out is None:
            out = [np.empty((n, length), dtype) for dtype in self.dtypes]
        inputs, labels = out[:2]
        inputs[...], labels[...] = tokens[:, :-1], tokens[:, 1:]
        short = np.flatnonzero(used <= length)
        if len(short):
            missing = np.arange(length) >= used[short, None] - 1
            labels[short] = np.where(missing, NO_TARGET, labels[short])
        if self.document_mask:
            labels[starts[:, 1:] > 0] = NO_TARGET
            out[2][...] = positions_in_documents(starts[:, :-1])
        return out

    @property
    def dtypes(self) -> tuple[type, ...]:
        """Of the arrays that :meth:`read` gives."""
        return (np.int64, np.int64, np.int32)[: 3 if self.document_mask else 2]

    def mean_visible(self, seed: int, window: int | None) -> float:
        """Mean number of positions that a position attends to, itself included.

        With ``document_mask`` estimated from the first samples of the order of ``seed``.
        ``window``: positions that a sliding window keeps; None: all.
        """
        length = self.sequence_length
        positions = np.arange(length)
        if self.document_mask:
            samples = np.arange(min(self.num_samples, SAMPLES_ESTIMATED), dtype=np.int64)
            positions = self.read(self.sample_ids(samples, seed))[2]
        return float(np.minimum(positions + 1, window or length).mean())

    def check_unchanged(self) -> None:
        """UserError if a file of an open shard has changed since the data set was opened."""
        started = time.monotonic()
        for shard in self._shards:
            if shard.opened:
                shard.check_unchanged()
        ended = time.monotonic()
        # On a slow file system less often, so that the checks take at most 2 % of the time.
        self._next_check = ended + max(CHECK_SECONDS, 50 * (ended - started))

    def _by_shard(self, samples: Integers) -> Iterator[tuple[_Shard, Integers, Integers]]:
        """(shard, rows of ``samples`` that lie in it, their numbers within the shard)."""
        rows = np.argsort(samples)
        samples = samples[rows]
        owner = np.searchsorted(self._firsts, samples, side="right") - 1
        starts = np.flatnonzero(np.diff(owner, prepend=-1)).tolist()
        local = samples - self._firsts[owner]
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            shard = self._shards[owner[start]]
            shard.files.check_sizes()
            yield shard, rows[start:stop], local[start:stop]

    def _read_windows(
        self, shard: IndexedShard, local: Integers, rows: Integers, out: NDArray[Any]
    ) -> Integers:
        length = self.sequence_length
        counts = np.minimum(shard.num_tokens - local * length, length + 1)
        whole = counts == length + 1
        if whole.all():  # rows of a 2-D view are copied at the speed of memory
            windows = shard.tokens[: shard.num_tokens // length * length].reshape(-1, length)
            out[rows, :-1] = windows[local]
            out[rows, -1] = shard.tokens[(local + 1) * length]
        else:
            _copy_rows(shard.tokens, local * length, counts, rows, out)
        return counts

    def _read_documents(
        self, shard: IndexedShard, local: Integers, rows: Integers, out: NDArray[Any]
    ) -> Integers:
        length = self.sequence_length
        starts, sizes = shard.spans(local)
        if not np.array_equal(sizes, shard.sizes(local)):  # from which the targets were counted
            raise UserError(
                f"{shard.idx}: document boundaries and lengths contradict each other; the file is "
                f"damaged, run the preprocessing again"
            )
        counts = np.minimum(sizes, length)
        _copy_rows(shard.tokens, starts, counts, rows, out)
        if self.append_eos and self.tokenizer.eos_id is not None:
            out[rows[sizes > length], length - 1] = self.tokenizer.eos_id
        return counts

    def _wrong_id(self, samples: Integers, tokens: NDArray[Any]) -> UserError:
        row, column = np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0]
        shard = self._shards[np.searchsorted(self._firsts, samples[row], side="right") - 1]
        return UserError(
            f"{shard.prefix}.bin: holds id {tokens[row, column]}, outside the vocabulary of "
            f"{self.vocab_size}; the file is damaged, run the preprocessing again"
        )


def _copy_rows(
    tokens: NDArray[Any], starts: Integers, counts: Integers, rows: Integers, out: NDArray[Any]
) -> None:
    """``out[row, :count] = tokens[start : start + count]`` for every row."""
    for row, start, count in zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True):
        out[row, :count] = tokens[start : start + count]


def _check_document_mask(
    manifests: Sequence[tuple[Path, DataManifest, tuple[ShardEntry, ...]]],
    sequence_length: int,
    packing: bool,
) -> None:
    if not packing:
        raise UserError(
            "data.document_mask is true and data.packing false, where each sample is one document "
            "already: leave data.document_mask out"
        )
    for folder, _, entries in manifests:
        check_document_ends(folder, entries, sequence_length)


def _common_tokenizer(
    manifests: Sequence[tuple[Path, DataManifest, tuple[ShardEntry, ...]]],
) -> TokenizerInfo:
    first_folder, first, _ = manifests[0]
    for folder, manifest, _ in manifests[1:]:
        mine, other = first.tokenizer, manifest.tokenizer
        if (mine.fingerprint, first.append_eos) != (other.fingerprint, manifest.append_eos):
            raise UserError(
                f"{first_folder} and {folder} were made with different tokenizers or EOS rules "
                f"({mine.fingerprint[:12]}, eos {first.append_eos}; {other.fingerprint[:12]}, eos "
                f"{manifest.append_eos}); preprocess them with one"
            )
    return first.tokenizer
