"""The input splits of a job and their names in the output."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.errors import UserError
from megalr.readers.hub import HUB_PREFIX, hub_shards
from megalr.readers.input_folders import files_of_folder

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TOKEN_FILES = {".bin": "megatron", ".ds": "datatrove"}
FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", **TOKEN_FILES}  # never compressed
LONGEST_NAME = 240  # with .validation.bin at most 255 bytes, the limit of file systems
COMPRESSIONS = (".gz", ".zst")
FAILURES_SHOWN = 3  # in one error


@dataclass(frozen=True)
class InputSplit:
    """An input file of ``size`` bytes, or the lines whose first byte lies in ``[start, stop)``.

    ``unit``: file, bytes (a range of an uncompressed file) or hub (shard ``number`` of ``count``
    of a data set of the Hugging Face hub).
    """

    file: Path
    size: int
    unit: str = "file"
    start: int = 0
    stop: int = 0
    number: int = 0
    count: int = 1


def input_kind(path: Path) -> str:
    """json, text, parquet, arrow, megatron or datatrove, by the name; UserError otherwise."""
    kind = known_kind(path)
    if kind is None:
        raise UserError(
            f"{path}: unknown kind of input; known are .json, .jsonl, .ndjson and .txt (also with "
            f".gz or .zst), .parquet, .arrow, .bin of Megatron and .ds of datatrove"
        )
    return kind


def known_kind(path: Path) -> str | None:
    """As :func:`input_kind`, but None for an unknown name; upper and lower case are alike."""
    name = path.name.lower()
    suffix = Path(name).suffix
    if suffix in FILE_KINDS:
        return FILE_KINDS[suffix]
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(JSON_SUFFIXES):
        return "json"
    return "text" if name.endswith(".txt") else None


def holds_tokens(input_split: InputSplit) -> bool:
    """Whether another program has tokenized this input already."""
    return input_split.unit != "hub" and input_split.file.suffix.lower() in TOKEN_FILES


def plan_splits(
    inputs: Sequence[str], split_bytes: int, shard_suffixes: Sequence[str] = ("",)
) -> dict[str, InputSplit]:
    """Output name of every input split, in the order of the manifest.

    inputs: files, folders, glob patterns and ``hub:...``. An uncompressed JSON or text file larger
    than ``split_bytes`` is divided at line ends into equal splits of at most ``split_bytes`` bytes;
    everything else is one split. shard_suffixes: added to a name for the shards of the split. No
    two shards have one name. The result depends on the files and these settings alone.
    """
    splits: list[InputSplit] = []
    files: dict[Path, Path] = {}  # by the targets of links, so that no file is read twice
    for pattern in inputs:
        if pattern.startswith(HUB_PREFIX):
            count = hub_shards(pattern)
            splits += [
                InputSplit(Path(pattern), 0, "hub", number=n, count=count) for n in range(count)
            ]
            continue
        for path in _matching_files(pattern):
            # A link keeps its own name: the name of its target may not say the kind, as in the
            # cache of the Hugging Face hub.
            named = path.parent.resolve() / path.name if path.is_symlink() else path.resolve()
            files[path.resolve()] = min(named, files.get(path.resolve(), named))
    for file in sorted(files.values()):
        splits += _splits_of_file(file, split_bytes)
    return dict(zip(_unique_names(splits, shard_suffixes), splits, strict=True))


def _matching_files(pattern: str) -> list[Path]:
    # A name with brackets may be a file's own name; glob would take them for a pattern.
    names = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    if not names:
        raise UserError(f"{pattern}: no such input file, and no file matches it as a pattern")
    result: list[Path] = []
    for path in map(Path, names):
        result += files_of_folder(path, known_kind) if path.is_dir() else [path]
    return result


def _splits_of_file(file: Path, split_bytes: int) -> list[InputSplit]:
    kind = input_kind(file)
    if not file.exists():
        raise UserError(f"{file}: a link to {file.resolve()}, which does not exist; fetch the file")
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: the file is empty; fetch it again or drop it from --input")
    divisible = kind in ("json", "text") and file.suffix.lower() not in COMPRESSIONS
    count = -(-size // split_bytes) if divisible else 1
    if count == 1:
        return [InputSplit(file, size)]
    borders = [size * number // count for number in range(count + 1)]
    return [
        InputSplit(file, size, "bytes", borders[number], borders[number + 1], number, count)
        for number in range(count)
    ]


def _stem(file: Path) -> str:
    name = str(file).removeprefix(HUB_PREFIX) if str(file).startswith(HUB_PREFIX) else file.name
    for suffix in (*COMPRESSIONS, *JSON_SUFFIXES, ".txt", *FILE_KINDS):
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).strip(".") or "input"


def _unique_names(splits: Sequence[InputSplit], shard_suffixes: Sequence[str]) -> list[str]:
    """Names of the splits; where two shards would share one, their files' paths are hashed in."""
    stems = {split.file: _stem(split.file) for split in splits}
    repeated = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    hashed = {file for file, stem in stems.items() if stem in repeated}
    while True:
        names = [_name(split, stems[split.file], split.file in hashed) for split in splits]
        owners: dict[str, set[Path]] = {}
        for name, split in zip(names, splits, strict=True):
            for suffix in shard_suffixes:
                owners.setdefault(name + suffix, set()).add(split.file)
        shared = {name: files for name, files in owners.items() if len(files) > 1}
        if not shared:
            return names
        more = set.union(*shared.values()) - hashed
        if not more:
            name, found = min(shared.items())
            first, second = sorted(found)[:2]
            raise UserError(
                f"{first} and {second}: both would be written as {name}; rename one of them"
            )
        hashed |= more


def _name(split: InputSplit, stem: str, hashed: bool) -> str:
    end = f"-part-{split.number:05d}-of-{split.count:05d}" if split.count > 1 else ""
    digest = "-" + hashlib.sha256(os.fsencode(split.file)).hexdigest()[:8]
    if len(stem) + len(digest) * hashed + len(end) > LONGEST_NAME:
        stem, hashed = stem[: LONGEST_NAME - len(digest) - len(end)], True
    return stem + digest * hashed + end


def failed_inputs(messages: Sequence[str], inputs: int) -> str:
    """``2 of 9 inputs failed: ...; ...``: the first messages and the number of the others."""
    shown = "; ".join(messages[:FAILURES_SHOWN])
    more = len(messages) - FAILURES_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    return f"{len(messages)} of {inputs} inputs failed: {shown}{rest}"
