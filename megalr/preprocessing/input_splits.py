"""Which pieces of input there are, and what they are called in the output."""

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
from megalr.preprocessing.hub import HUB_PREFIX, hub_shards

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TOKEN_FILES = {".bin": "megatron", ".ds": "datatrove"}
COMPRESSIONS = (".gz", ".zst")


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
    """json, text, parquet, megatron or datatrove, by the name; UserError otherwise."""
    name = path.name.lower()
    for suffix in (".gz", ".zst"):
        name = name.removesuffix(suffix)
    if name.endswith(JSON_SUFFIXES):
        return "json"
    if name.endswith(".txt"):
        return "text"
    if path.name.lower().endswith(".parquet"):
        return "parquet"
    if path.suffix in TOKEN_FILES:
        return TOKEN_FILES[path.suffix]
    raise UserError(
        f"{path}: unknown kind of input; known are .json, .jsonl, .ndjson and .txt (also with .gz "
        f"or .zst), .parquet, .bin of Megatron and .ds of datatrove"
    )


def holds_tokens(part: InputSplit) -> bool:
    """Whether the part was tokenized by another program already."""
    return part.unit != "hub" and part.file.suffix in TOKEN_FILES


def plan_splits(inputs: Sequence[str], split_bytes: int) -> dict[str, InputSplit]:
    """Name in the output of every piece of the inputs, in the order of the manifest.

    inputs: file names, glob patterns and ``hub:...``. An uncompressed JSON or text file larger than
    ``split_bytes`` is divided at line ends into equal parts of at most so many bytes; everything
    else is one part. The result depends on the files and ``split_bytes`` alone.
    """
    parts: list[InputSplit] = []
    files: dict[Path, Path] = {}  # by what links lead to, so that no file is read twice
    for pattern in inputs:
        if pattern.startswith(HUB_PREFIX):
            count = hub_shards(pattern)
            parts += [
                InputSplit(Path(pattern), 0, "hub", number=n, count=count) for n in range(count)
            ]
            continue
        # A name with brackets may be a file's own name; glob would take them for a pattern.
        names = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        if not names:
            raise UserError(f"{pattern}: no such input file, and no file matches it as a pattern")
        for path in map(Path, names):
            # A link keeps its own name: what it points to may have none that tells its kind, as in
            # the cache of the Hugging Face hub.
            named = path.parent.resolve() / path.name if path.is_symlink() else path.resolve()
            files[path.resolve()] = min(named, files.get(path.resolve(), named))
    for file in sorted(files.values()):
        parts += _parts_of_file(file, split_bytes)
    stems = {part.file: _stem(part.file) for part in parts}
    repeated = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    return {_name(part, stems[part.file], repeated): part for part in parts}


def _parts_of_file(file: Path, split_bytes: int) -> list[InputSplit]:
    if file.is_dir():
        raise UserError(f"{file}: is a folder; give its files, for example '{file}/*.json.gz'")
    kind = input_kind(file)
    if not file.exists():
        raise UserError(f"{file}: a link to {file.resolve()}, which does not exist; fetch the file")
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: the file is empty; fetch it again or leave it out")
    divisible = kind in ("json", "text") and file.suffix not in COMPRESSIONS
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
    for suffix in (*COMPRESSIONS, *JSON_SUFFIXES, ".txt", ".parquet", *TOKEN_FILES):
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).strip(".") or "input"


def _name(part: InputSplit, stem: str, repeated: set[str]) -> str:
    if stem in repeated:  # files of one name in several folders
        stem += "-" + hashlib.sha256(str(part.file).encode()).hexdigest()[:8]
    if part.count > 1:
        stem += f"-part-{part.number:05d}-of-{part.count:05d}"
    return stem
