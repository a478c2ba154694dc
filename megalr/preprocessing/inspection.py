"""Verifying and describing a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalr.data.manifest import DataManifest, ShardEntry, check_sizes, load_manifest
from megalr.data.megatron_index import IndexedShard
from megalr.errors import UserError
from megalr.files import disk_errors, sha256_of_file
from megalr.preprocessing.tokenizer import Tokenizer, open_tokenizer

TOKENS_AT_ONCE = 1 << 22
LENGTH_BINS = 33  # bin k counts the documents of 2**k .. 2**(k+1) - 1 tokens; bin 0 also the empty


@dataclass
class Statistics:
    """Figures of one split. length_counts: documents by floor(log2(tokens)), int64 (33,)."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    shortest: int = 0
    longest: int = 0
    bad_lines: int = 0
    empty_documents: int = 0
    tokens_per_shard: list[int] = field(default_factory=list)
    length_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(LENGTH_BINS, np.int64)
    )

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; 0 where the manifest does not know the text."""
        return self.text_bytes / self.tokens if self.tokens else 0.0


@dataclass
class Inspection:
    """What was found: damages (empty if the data set is sound) and statistics by split."""

    manifest: DataManifest
    damages: list[str]
    statistics: dict[str, Statistics]


def inspect_dataset(
    folder: Path, full: bool = False, progress: Callable[[str], None] = lambda name: None
) -> Inspection:
    """Verify every shard and collect statistics.

    Always: file sizes against the manifest, and header, lengths, offsets and document boundaries of
    every index. ``full``: also the checksums of all files, that every id lies in the vocabulary,
    that every document ends in EOS (if it was appended), and that the tokenizer is the recorded
    one. Damages are collected, not raised; UserError only for an unreadable manifest.
    """
    manifest = load_manifest(folder)
    damages: list[str] = []
    statistics: dict[str, Statistics] = {}
    if full:
        _attempt(damages, lambda: open_dataset_tokenizer(folder, manifest))
    for entry in manifest.shards:
        progress(entry.name)

        def inspect(entry: ShardEntry = entry) -> None:
            check_sizes(folder, [entry])
            if full:
                _check_checksums(folder, entry)
            shard = IndexedShard(folder / entry.name)
            if (shard.num_documents, shard.num_tokens) != (entry.documents, entry.tokens):
                raise UserError(
                    f"{shard.idx}: {shard.num_documents} documents and {shard.num_tokens} tokens, "
                    f"the manifest says {entry.documents} and {entry.tokens}"
                )
            if full:
                _check_ids(shard, entry, manifest)
            _count(statistics.setdefault(entry.split, Statistics()), shard, entry)

        _attempt(damages, inspect)
    return Inspection(manifest, damages, statistics)


def _attempt(damages: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except UserError as error:
        damages.append(str(error))


def _check_checksums(folder: Path, entry: ShardEntry) -> None:
    for suffix, expected in ((".bin", entry.bin_sha256), (".idx", entry.idx_sha256)):
        path = folder / f"{entry.name}{suffix}"
        if (found := sha256_of_file(path)) != expected:
            raise UserError(f"{path}: SHA-256 is {found}, the manifest says {expected}")


def _check_ids(shard: IndexedShard, entry: ShardEntry, manifest: DataManifest) -> None:
    largest = -1
    for start in range(0, shard.num_tokens, TOKENS_AT_ONCE):
        block = shard.tokens[start : start + TOKENS_AT_ONCE]
        if int(block.min()) < 0:
            raise UserError(f"{shard.bin}: holds id {int(block.min())}")
        largest = max(largest, int(block.max()))
    if largest >= manifest.tokenizer.vocab_size or largest != entry.max_id:
        raise UserError(
            f"{shard.bin}: the largest id is {largest}, the manifest says {entry.max_id} and a "
            f"vocabulary of {manifest.tokenizer.vocab_size}"
        )
    if manifest.append_eos and shard.num_documents:
        starts, counts = shard.spans(np.arange(shard.num_documents, dtype=np.int64))
        ends = np.where(counts > 0, shard.tokens[np.maximum(starts + counts - 1, 0)], -1)
        wrong = np.flatnonzero(ends != manifest.tokenizer.eos_id)
        if len(wrong):
            raise UserError(
                f"{shard.bin}: {len(wrong)} documents do not end in EOS "
                f"({manifest.tokenizer.eos_id}), the first is document {wrong[0]}"
            )


def _count(total: Statistics, shard: IndexedShard, entry: ShardEntry) -> None:
    total.shards += 1
    total.documents += entry.documents
    total.tokens += entry.tokens
    total.text_bytes += entry.text_bytes
    total.bad_lines += entry.bad_lines
    total.empty_documents += entry.empty_documents
    total.tokens_per_shard.append(entry.tokens)
    if not shard.num_documents:
        return
    _, lengths = shard.spans(np.arange(shard.num_documents, dtype=np.int64))
    shortest, longest = int(lengths.min()), int(lengths.max())
    total.shortest = shortest if total.longest == 0 else min(total.shortest, shortest)
    total.longest = max(total.longest, longest)
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1  # floor of log2, exact
    total.length_counts += np.bincount(exponents, minlength=LENGTH_BINS)


def open_dataset_tokenizer(folder: Path, manifest: DataManifest) -> Tokenizer:
    """The tokenizer in the data folder, checked to be the one that made the ids."""
    tokenizer = open_tokenizer(folder / manifest.tokenizer.path)
    if not tokenizer.has_fingerprint(manifest.tokenizer.fingerprint):
        raise UserError(
            f"{folder / manifest.tokenizer.path}: fingerprint {tokenizer.fingerprint}, the shards "
            f"were made with {manifest.tokenizer.fingerprint}; put the right tokenizer back"
        )
    return tokenizer


def read_document(folder: Path, number: int, split: str) -> tuple[list[int], str, str]:
    """Ids, text and shard name of the ``number``-th document of a split, counted from 0."""
    manifest = load_manifest(folder)
    shards = manifest.split(split)
    total = sum(entry.documents for entry in shards)
    if not 0 <= number < total:
        raise UserError(f"{folder}: no document {number}, the split '{split}' has {total}")
    left = number
    for entry in shards:
        if left < entry.documents:
            break
        left -= entry.documents
    ids = [int(token) for token in IndexedShard(folder / entry.name).document(left)]
    return ids, open_dataset_tokenizer(folder, manifest).decode(ids), entry.name


def draw_length_histogram(statistics: dict[str, Statistics], path: Path) -> None:
    """A PNG with the number of documents by length in tokens, one series a split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    used = np.flatnonzero(
        sum((s.length_counts for s in statistics.values()), np.zeros(LENGTH_BINS))
    )
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    width = 0.8 / max(len(statistics), 1)
    for number, (split, figures) in enumerate(sorted(statistics.items())):
        bins = np.arange(first, last + 1)
        share = figures.length_counts[first : last + 1] / max(figures.documents, 1)
        axes.bar(bins + number * width, 100 * share, width, align="edge", label=split)
    axes.set_xticks(range(first, last + 2), [f"{2**k:,}" for k in range(first, last + 2)])
    axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents (%)")
    axes.legend()
    figure.tight_layout()
    with disk_errors(path):
        figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
