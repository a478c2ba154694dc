"""From one input split to finished shards: the work of every worker."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalr.data.manifest import ShardEntry, SourceInfo, check_entry
from megalr.data.records import (
    CHECKSUM_KEY,
    EXACT,
    parse_record,
    read_json,
    record_checksum,
    take_checksum,
)
from megalr.errors import UserError
from megalr.files import sha256_of_file, write_atomic
from megalr.preprocessing.shard_writer import ShardWriter
from megalr.preprocessing.tokenizer import Tokenizer, open_tokenizer
from megalr.readers.documents import DocumentReader, ReadOptions, ReadReport
from megalr.readers.input_splits import InputSplit, holds_tokens
from megalr.readers.token_sources import TokenReader

FINISHED_FOLDER = "finished"
# Documents, bytes of text, tokens and bytes of input files since the last call.
Progress = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class WorkSettings:
    """Everything besides the input that determines the shards.

    validation_fraction: documents whose hash falls below it go to a second shard of the split
    validation, the rest to ``split``.
    """

    output: Path
    tokenizer: Path
    append_eos: bool = True
    validation_fraction: float = 0.0
    split: str = "train"
    reading: ReadOptions = field(default_factory=ReadOptions)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits into which the documents go, the main one first."""
        return (self.split, "validation") if self.validation_fraction > 0 else (self.split,)

    def shard_suffix(self, split: str) -> str:
        """Added to the name of an input split for its shard of ``split``."""
        return "" if split == self.split else f".{split}"

    def record(self, fingerprint: str) -> dict[str, Any]:
        """The settings that all runs into one folder share; ``fingerprint``: the tokenizer's."""
        return {
            "tokenizer": fingerprint,
            "append_eos": self.append_eos,
            "text_key": self.reading.text_key,
            "text_documents": self.reading.text_documents,
            "validation_fraction": self.validation_fraction,
            "split": self.split,
        }

    def record_like(self, earlier: Any, tokenizer: Tokenizer) -> dict[str, Any]:
        """The record to compare with an earlier run's, with its form of the fingerprint."""
        found = earlier.get("tokenizer") if isinstance(earlier, dict) else None
        same = isinstance(found, str) and tokenizer.has_fingerprint(found)
        return self.record(str(found) if same else tokenizer.fingerprint)


@dataclass(frozen=True)
class SplitResult:
    """The result of one input split: its shards, the counts of its reader, and whether an earlier
    run had finished it."""

    name: str
    shards: tuple[ShardEntry, ...]
    report: ReadReport
    reused: bool = False


@dataclass(frozen=True)
class _Batch:
    """A batch of documents: ids concatenated, number of ids and of UTF-8 bytes of each, and the
    bytes whose hash decides between training and validation."""

    ids: NDArray[Any]
    lengths: NDArray[Any]
    text_bytes: NDArray[np.int64]
    keys: list[bytes]


class SplitWorker:
    """Turns input splits into shards with one tokenizer; one instance per worker process."""

    def __init__(self, settings: WorkSettings, job: str) -> None:
        self.settings, self.job = settings, job
        self.tokenizer: Tokenizer = open_tokenizer(settings.tokenizer)
        self._record = settings.record(self.tokenizer.fingerprint)

    def process(self, name: str, input_split: InputSplit, progress: Progress) -> SplitResult:
        """Write the shards of one input split, unless an earlier run did and they are intact."""
        previous = finished_split(name, input_split, self.settings, self.tokenizer)
        if previous is not None:
            return previous
        report = ReadReport()
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    ShardWriter(self._prefix(name, split), self.tokenizer.vocab_size, self.job)
                )
                for split in self.settings.splits
            }
            text_bytes = dict.fromkeys(writers, 0)
            consumed = 0
            for batch in self._batches(input_split, report):
                self._write_batch(batch, writers, text_bytes)
                progress(
                    len(batch.lengths),
                    int(batch.text_bytes.sum()),
                    len(batch.ids),
                    report.input_bytes - consumed,
                )
                consumed = report.input_bytes
            source = SourceInfo(
                str(input_split.file),
                input_split.size,
                report.sha256,
                input_split.unit,
                input_split.start,
                input_split.stop,
            )
            shards = []
            for split, writer in writers.items():
                entry = ShardEntry(
                    name=self._prefix(name, split).name,
                    split=split,
                    source=source,
                    text_bytes=text_bytes[split],
                    # What was skipped belongs to no split: it is counted once.
                    bad_lines=report.bad if split == self.settings.split else 0,
                    empty_documents=report.empty if split == self.settings.split else 0,
                    **asdict(writer.finish()),
                )
                shards.append(entry)
        result = SplitResult(name, tuple(shards), report)
        self._save(result)
        return result

    @property
    def _divides(self) -> bool:
        return len(self.settings.splits) > 1

    def _prefix(self, name: str, split: str) -> Path:
        return self.settings.output / f"{name}{self.settings.shard_suffix(split)}"

    def _batches(self, input_split: InputSplit, report: ReadReport) -> Iterator[_Batch]:
        if holds_tokens(input_split):
            eos_id = self.tokenizer.eos_id if self.settings.append_eos else None
            for ids, lengths in TokenReader(input_split, self.tokenizer, eos_id, report):
                pieces = np.split(ids, np.cumsum(lengths)[:-1]) if self._divides else []
                keys = [piece.astype("<i8").tobytes() for piece in pieces]
                yield _Batch(ids, lengths, np.zeros(len(lengths), np.int64), keys)
            return
        for texts in DocumentReader(input_split, self.settings.reading, report):
            yield self._encode(texts, report)

    def _encode(self, texts: list[str], report: ReadReport) -> _Batch:
        ids, lengths = self.tokenizer.encode(texts, self.settings.append_eos)
        # A text of nothing but characters that the tokenizer drops has no ids of its own.
        empty = lengths == (1 if self.settings.append_eos else 0)
        if empty.any():
            ids, lengths = ids[~np.repeat(empty, lengths)], lengths[~empty]
            texts = [text for text, drop in zip(texts, empty, strict=True) if not drop]
            report.empty += int(empty.sum())
        encoded = [text.encode() for text in texts]
        sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return _Batch(ids, lengths, sizes, encoded if self._divides else [])

    def _write_batch(
        self, batch: _Batch, writers: dict[str, ShardWriter], text_bytes: dict[str, int]
    ) -> None:
        fraction = self.settings.validation_fraction
        held_out = np.zeros(len(batch.lengths), bool)
        if self._divides:
            held_out[:] = [in_validation(key, fraction) for key in batch.keys]
        of_token = np.repeat(held_out, batch.lengths)
        for split, chosen in zip(writers, (False, True), strict=False):
            writers[split].add(batch.ids[of_token == chosen], batch.lengths[held_out == chosen])
            text_bytes[split] += int(batch.text_bytes[held_out == chosen].sum())

    def _save(self, result: SplitResult) -> None:
        content: dict[str, Any] = {
            "settings": self._record,
            "shards": [asdict(shard) for shard in result.shards],
            "report": asdict(result.report),
        }
        content[CHECKSUM_KEY] = record_checksum(content)
        path = finished_path(self.settings.output, result.name)
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode(), self.job)


def in_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: its hash, as a number in [0, 1), lies below ``fraction``.

    Equal documents fall on the same side wherever they occur.
    """
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def finished_path(output: Path, name: str) -> Path:
    """The file that records that input split ``name`` is finished."""
    return output / FINISHED_FOLDER / f"{name}.json"


@dataclass(frozen=True)
class _FinishedRecord:
    """Contents of ``finished/NAME.json``."""

    __pydantic_config__ = EXACT
    settings: dict[str, Any]
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1)]
    report: ReadReport


def load_finished(
    output: Path, name: str, settings: WorkSettings, vocab_size: int
) -> tuple[dict[str, Any], SplitResult]:
    """Settings and result that an earlier run recorded for an input split.

    The record is checked to be consistent; the files are not looked at. UserError otherwise.
    """
    path = finished_path(output, name)
    content = read_json(path)
    unchanged = take_checksum(content)
    found = parse_record(_FinishedRecord, content, str(path))
    for number, shard in enumerate(found.shards):
        check_entry(shard, vocab_size, f"{path}: shard {number}")
        if shard.name != name + settings.shard_suffix(shard.split):
            raise UserError(f"{path}: shard {number} is '{shard.name}' of '{shard.split}'")
    report = found.report
    documents = sum(shard.documents for shard in found.shards)
    if documents + report.bad + report.empty != report.records:
        raise UserError(
            f"{path}: {report.records} records were read, but {documents} documents, {report.bad} "
            f"bad and {report.empty} empty ones are recorded"
        )
    skipped = [(shard.bad_lines, shard.empty_documents) for shard in found.shards]
    if skipped != [(report.bad, report.empty)] + [(0, 0)] * (len(skipped) - 1):
        raise UserError(f"{path}: the shards' counts of skipped records differ from the report's")
    if any(shard.source.sha256 != report.sha256 for shard in found.shards):
        raise UserError(f"{path}: the checksums of the input differ")
    if not unchanged:
        raise UserError(f"{path}: does not match its own checksum; the file was edited or damaged")
    return found.settings, SplitResult(name, found.shards, report, reused=True)


def finished_split(
    name: str, input_split: InputSplit, settings: WorkSettings, tokenizer: Tokenizer
) -> SplitResult | None:
    """The result of an earlier run if its source has the same size and every file its checksum."""
    output = settings.output
    if not finished_path(output, name).exists():
        return None
    try:
        recorded, result = load_finished(output, name, settings, tokenizer.vocab_size)
    except UserError:
        return None  # damaged: the input split is processed again
    source = result.shards[0].source
    if recorded != settings.record_like(recorded, tokenizer) or (
        source.bytes,
        source.start,
        source.stop,
    ) != (input_split.size, input_split.start, input_split.stop):
        return None
    if tuple(shard.split for shard in result.shards) != settings.splits:
        return None
    for shard in result.shards:
        prefix = output / shard.name
        for suffix, size, sha256 in (
            (".bin", shard.bin_bytes, shard.bin_sha256),
            (".idx", shard.idx_bytes, shard.idx_sha256),
        ):
            path = Path(f"{prefix}{suffix}")
            if not path.is_file() or path.stat().st_size != size:
                return None
            if sha256_of_file(path) != sha256:
                return None
    return result
