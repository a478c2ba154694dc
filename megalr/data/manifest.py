"""The manifest: one JSON file that describes all shards of a data set."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megalr.data.mapped_file import FileStamp
from megalr.data.megatron_index import token_dtype
from megalr.data.records import (
    CHECKSUM_KEY,
    EXACT,
    Count,
    FileName,
    Flag,
    InnerPath,
    OptionalSha256,
    Sha256,
    Text,
    parse_record,
    read_json,
    record_checksum,
    take_checksum,
)
from megalr.errors import UserError
from megalr.files import write_atomic

MANIFEST_NAME = "manifest.json"
FORMAT = "megalr-data"
FORMAT_VERSION = 1
HEAD_BYTES = 4096  # of a file, enough for the name of the format
LARGEST_VOCABULARY = 1 << 31
TokenizerKind = Annotated[str, Field(strict=True, pattern="^(sentencepiece|huggingface)$")]
InputUnit = Annotated[str, Field(strict=True, pattern="^(file|bytes|hub)$")]
SplitName = Annotated[str, Field(strict=True, pattern="^(train|validation)$")]


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids. ``path`` is relative to the manifest's folder."""

    __pydantic_config__ = EXACT
    path: InnerPath
    kind: TokenizerKind
    fingerprint: Sha256
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=LARGEST_VOCABULARY)]
    eos_id: Count | None
    pad_id: Count


@dataclass(frozen=True)
class SourceInfo:
    """The input of a shard: a file, or ``[start, stop)`` of it in units of ``part_unit``."""

    __pydantic_config__ = EXACT
    file: FileName
    bytes: Count
    sha256: OptionalSha256
    part_unit: InputUnit = "file"
    start: Count = 0
    stop: Count = 0


@dataclass(frozen=True)
class ShardEntry:
    """One ``.bin``/``.idx`` pair. ``name`` is its prefix relative to the manifest's folder."""

    __pydantic_config__ = EXACT
    name: InnerPath
    split: SplitName
    documents: Count
    tokens: Count
    max_id: Annotated[int, Field(strict=True, ge=-1, lt=LARGEST_VOCABULARY)]
    bin_bytes: Count
    idx_bytes: Count
    bin_sha256: Sha256
    idx_sha256: Sha256
    source: SourceInfo
    text_bytes: Count = 0
    bad_lines: Count = 0
    empty_documents: Count = 0


@dataclass(frozen=True)
class DataManifest:
    """A data set: the tokenizer, whether documents end in its EOS, and the shards in order."""

    __pydantic_config__ = EXACT
    tokenizer: TokenizerInfo
    append_eos: Flag
    dtype: Text
    shards: tuple[ShardEntry, ...]
    program_version: Text = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """The shards of one split, ``train`` or ``validation``."""
        return tuple(shard for shard in self.shards if shard.split == name)

    def totals(self) -> dict[str, dict[str, int]]:
        """Shards, documents, tokens and bytes of each split."""
        names = sorted({shard.split for shard in self.shards})
        return {name: _total(self.split(name)) for name in names}

    def save(self, folder: Path, job: str = "single") -> None:
        """Write ``manifest.json`` atomically."""
        record = asdict(self)
        shards = record.pop("shards")
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **record}
        content["totals"] = self.totals()
        content[CHECKSUM_KEY] = record_checksum({**content, "shards": shards})
        lines = ",\n  ".join(json.dumps(shard) for shard in shards)  # one shard a line
        text = json.dumps(content, indent=1)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n'
        write_atomic(folder / MANIFEST_NAME, text.encode(), job)


def _total(shards: Iterable[ShardEntry]) -> dict[str, int]:
    total = {"shards": 0, "documents": 0, "tokens": 0, "bytes": 0}
    for shard in shards:
        total["shards"] += 1
        total["documents"] += shard.documents
        total["tokens"] += shard.tokens
        total["bytes"] += shard.bin_bytes + shard.idx_bytes
    return total


def load_manifest(path: str | Path) -> DataManifest:
    """Read the manifest of a data folder (or the manifest file itself) and check its contents."""
    path = _manifest_of(Path(path))
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of this program")
    if (version := record.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path}: manifest version {version}, this program reads {FORMAT_VERSION}")
    unchanged = take_checksum(record)
    del record["format"], record["format_version"]
    totals = record.pop("totals", None)
    manifest = parse_record(DataManifest, record, str(path))
    if manifest.totals() != totals:
        raise UserError(f"{path}: the totals do not match the shards; the file was edited")
    _check_consistent(manifest, str(path))
    if not unchanged:
        raise UserError(f"{path}: does not match its own checksum; the file was edited or damaged")
    return manifest


def _manifest_of(path: Path) -> Path:
    """The manifest's path; a UserError that says what to do if ``path`` is no data set."""
    command = "megalr data --input {} --tokenizer TOKENIZER --output FOLDER"
    if path.is_dir():
        if (path / MANIFEST_NAME).is_file():
            return path / MANIFEST_NAME
        if (path / "job.json").is_file():
            raise UserError(
                f"{path / MANIFEST_NAME}: no such file, the preprocessing into this folder has not "
                f"finished; start its command again"
            )
        raise UserError(
            f"{path / MANIFEST_NAME}: no such file; a data set is a folder that "
            f"`megalr data` has finished. If this folder holds text, preprocess it first: "
            f"{command.format(path)}"
        )
    file = path if path.exists() else Path(f"{path}.bin")  # the prefix of a Megatron shard
    if not file.exists():
        raise UserError(
            f"{path}: no such file; a data set is a folder that `megalr data` has finished"
        )
    try:
        with open(file, "rb") as stream:
            found = FORMAT.encode() in stream.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not found and path.name != MANIFEST_NAME:
        raise UserError(
            f"{file}: is no data set but a single file; preprocess it first "
            f"({command.format(file)}) and give FOLDER in its place"
        )
    return path


def _check_consistent(manifest: DataManifest, place: str) -> None:
    tokenizer = manifest.tokenizer
    size = tokenizer.vocab_size
    for name, token in (("eos_id", tokenizer.eos_id), ("pad_id", tokenizer.pad_id)):
        if token is not None and token >= size:
            raise UserError(f"{place}: {name} is {token}, outside the vocabulary of {size}")
    if manifest.append_eos and tokenizer.eos_id is None:
        raise UserError(f"{place}: append_eos is true and the tokenizer has no eos_id")
    dtype = token_dtype(size)
    if manifest.dtype != dtype.name:
        raise UserError(
            f"{place}: dtype is {manifest.dtype!r}, a vocabulary of {size} needs {dtype.name}"
        )
    for number, shard in enumerate(manifest.shards):
        check_entry(shard, size, f"{place}: shard {number}")
    names = Counter(shard.name for shard in manifest.shards)
    for name, count in names.most_common(1):
        if count > 1:
            raise UserError(f"{place}: lists the shard '{name}' {count} times; the file was edited")


def check_entry(shard: ShardEntry, vocab_size: int, place: str) -> None:
    """UserError if the counts of a shard contradict each other or the vocabulary."""
    if shard.max_id >= vocab_size or (shard.max_id < 0) != (shard.tokens == 0):
        raise UserError(
            f"{place}: max_id is {shard.max_id} with {shard.tokens} tokens of a vocabulary of "
            f"{vocab_size}"
        )
    if shard.bin_bytes != shard.tokens * token_dtype(vocab_size).itemsize:
        raise UserError(
            f"{place}: bin_bytes is {shard.bin_bytes}, {shard.tokens} tokens need "
            f"{shard.tokens * token_dtype(vocab_size).itemsize}"
        )
    if shard.source.start > shard.source.stop:
        raise UserError(
            f"{place}: the source runs from {shard.source.start} back to {shard.source.stop}"
        )


def check_sizes(folder: Path, shards: Iterable[ShardEntry]) -> dict[str, FileStamp]:
    """Compare the size of every file with the manifest; size and time of each by its path.

    Two ``stat`` calls per shard.
    """
    stamps: dict[str, FileStamp] = {}
    for shard in shards:
        for suffix, expected in ((".bin", shard.bin_bytes), (".idx", shard.idx_bytes)):
            path = f"{folder}/{shard.name}{suffix}"
            try:
                stamps[path] = FileStamp.of(os.stat(path))
            except FileNotFoundError:
                raise UserError(
                    f"{path}: the manifest lists this file and it does not exist; copy the data "
                    f"set again or run the preprocessing again"
                ) from None
            if stamps[path].size != expected:
                raise UserError(
                    f"{path}: {stamps[path].size} bytes, the manifest says {expected}; copy the "
                    f"data set again or run the preprocessing again"
                )
    return stamps
