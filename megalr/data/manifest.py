"""The manifest: one JSON file that describes all shards of a data set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from megalr.errors import UserError
from megalr.files import write_atomic

MANIFEST_NAME = "manifest.json"
FORMAT = "megalr-data"
FORMAT_VERSION = 1
Record = TypeVar("Record")


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids. ``path`` is relative to the manifest's folder."""

    path: str
    kind: str
    fingerprint: str
    vocab_size: int
    eos_id: int | None
    pad_id: int


@dataclass(frozen=True)
class SourceInfo:
    """The input of a shard: a file, or ``[start, stop)`` of it in units of ``part_unit``."""

    file: str
    bytes: int
    sha256: str
    part_unit: str = "file"
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class ShardEntry:
    """One ``.bin``/``.idx`` pair. ``name`` is its prefix relative to the manifest's folder."""

    name: str
    split: str
    documents: int
    tokens: int
    max_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    source: SourceInfo
    text_bytes: int = 0
    bad_lines: int = 0
    empty_documents: int = 0


@dataclass(frozen=True)
class DataManifest:
    """A data set: the tokenizer, whether documents end in its EOS, and the shards in order."""

    tokenizer: TokenizerInfo
    append_eos: bool
    dtype: str
    shards: tuple[ShardEntry, ...]
    program_version: str = ""
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


def _build(kind: type[Record], record: Any, place: str) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object, found {type(record).__name__}")
    wanted = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(record) - wanted)
    if unknown:
        raise UserError(f"{place}: unknown key '{unknown[0]}'")
    try:
        return kind(**record)
    except TypeError as error:
        raise UserError(f"{place}: {error}; the file is incomplete") from error


def entry_from_json(record: Any, place: str) -> ShardEntry:
    """A shard entry from parsed JSON; UserError names ``place`` when something is missing."""
    entry = _build(ShardEntry, record, place)
    source = _build(SourceInfo, entry.source, f"{place}: source")
    return ShardEntry(**{**entry.__dict__, "source": source})


def read_json(path: Path) -> Any:
    """Parsed JSON of a file, or a UserError with the place of the mistake."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged") from None


def load_manifest(path: str | Path) -> DataManifest:
    """Read the manifest of a data folder (or the manifest file itself) and check its structure."""
    path = Path(path)
    path = path / MANIFEST_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a data set is a folder that tools/preprocess_c4.py has finished"
        )
    record = read_json(path)
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a manifest of this program")
    if (version := record.pop("format_version", None)) != FORMAT_VERSION:
        raise UserError(f"{path}: manifest version {version}, this program reads {FORMAT_VERSION}")
    totals = record.pop("totals", None)
    manifest = _build(DataManifest, record, str(path))
    shards = tuple(
        entry_from_json(shard, f"{path}: shard {number}")
        for number, shard in enumerate(manifest.shards)
    )
    tokenizer = _build(TokenizerInfo, manifest.tokenizer, f"{path}: tokenizer")
    manifest = DataManifest(**{**manifest.__dict__, "shards": shards, "tokenizer": tokenizer})
    if manifest.totals() != totals:
        raise UserError(f"{path}: the totals do not match the shards; the file was edited")
    return manifest


def check_sizes(folder: Path, shards: Iterable[ShardEntry]) -> None:
    """Compare the size of every file with the manifest (two ``stat`` calls a shard)."""
    for shard in shards:
        for suffix, expected in ((".bin", shard.bin_bytes), (".idx", shard.idx_bytes)):
            path = f"{folder}/{shard.name}{suffix}"
            try:
                size = os.stat(path).st_size
            except FileNotFoundError:
                raise UserError(
                    f"{path}: the manifest lists this file and it does not exist; copy the data "
                    f"set again or run the preprocessing again"
                ) from None
            if size != expected:
                raise UserError(
                    f"{path}: {size} bytes, the manifest says {expected}; copy the data set again "
                    f"or run the preprocessing again"
                )
