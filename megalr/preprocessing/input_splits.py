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


def holds_tokens(input_split: InputSplit) -> bool:
    """Whether another program has tokenized this input already."""
    return input_split.unit != "hub" and input_split.file.suffix in TOKEN_FILES


def plan_splits(inputs: Sequence[str], split_bytes: int) -> dict[str, InputSplit]:
    """Output name of every input split, in the order of the manifest.

    inputs: file names, glob patterns and ``hub:...``. An uncompressed JSON or text file larger than
    ``split_bytes`` is divided at line ends into equal splits of at most ``split_bytes`` bytes;
    everything else is one split. The result depends on the files and ``split_bytes`` alone.
    """
    splits: list[InputSplit] = []
    files: dict[Path, Path] = {}  # by what links lead to, so that no file is read twice
    for pattern in inputs:
        if pattern.startswith(HUB_PREFIX):
            count = hub_shards(pattern)
            splits += [
                InputSplit(Path(pattern), 0, "hub", number=n, count=count) for n in range(count)
            ]
            continue
        # A name with brackets may be a file's own name; glob would take them for a pattern.
        names = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        if not names:
            raise UserError(f"{pattern}: no such input file, and no file matches it as a pattern")
        for path in map(Path, names):
            # A link keeps its own name: the name of its target may not say the kind, as in the
            # cache of the Hugging Face hub.
            named = path.parent.resolve() / path.name if path.is_symlink() else path.resolve()
            files[path.resolve()] = min(named, files.get(path.resolve(), named))
    for file in sorted(files.values()):
        splits += _splits_of_file(file, split_bytes)
    stems = {input_split.file: _stem(input_split.file) for input_split in splits}
    repeated = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    return {
        _name(input_split, stems[input_split.file], repeated): input_split for input_split in splits
    }


def _splits_of_file(file: Path, split_bytes: int) -> list[InputSplit]:
    if file.is_dir():
        raise UserError(f"{file}: is a folder; give its files, for example '{file}/*.json.gz'")
    kind = input_kind(file)
    if not file.exists():
        raise UserError(f"{file}: a link to {file.resolve()}, which does not exist; fetch the file")
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: the file is empty; fetch it again or drop it from --input")
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


def _name(input_split: InputSplit, stem: str, repeated: set[str]) -> str:
    if stem in repeated:  # files of one name in several folders
        stem += "-" + hashlib.sha256(str(input_split.file).encode()).hexdigest()[:8]
    if input_split.count > 1:
        stem += f"-part-{input_split.number:05d}-of-{input_split.count:05d}"
    return stem
