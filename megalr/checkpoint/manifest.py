"""The manifest of a checkpoint: its files with their sizes and checksums. Written last.

The checksum is CRC-32 (zlib): it detects flipped bits and torn blocks at several times the speed
of a cryptographic hash.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)

from megalr.files import LARGEST_JSON

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 22  # bytes read at a time


class Damaged(ValueError):
    """A checkpoint or one of its files is not as it was written; the message says how."""


@dataclass(frozen=True)
class FileRecord:
    """Size (bytes) and CRC-32 of a file."""

    size: NonNegativeInt
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]


@dataclass(frozen=True)
class CheckpointManifest:
    """Contents of a checkpoint.

    Attributes:
        update: updates done when it was saved.
        layout: how the state is distributed over ranks
            (:func:`megalr.engine.checkpoint_files.layout_of`).
        validation_loss: of the saved model; None if it was not evaluated at that update.
        files: record of every file, by path relative to the folder.
    """

    update: NonNegativeInt
    layout: dict[str, Any]
    validation_loss: float | None
    files: dict[str, FileRecord]


class _Version(BaseModel, strict=True):
    format: int


_MANIFEST = TypeAdapter(CheckpointManifest)


def record_of(path: Path, durable: bool = False) -> FileRecord:
    """Read a file and return its record; ``durable``: also flush it to the disk."""
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(_BLOCK))
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
            size += count
        if durable:
            os.fsync(file.fileno())
    return FileRecord(size, checksum)


def manifest_text(manifest: CheckpointManifest) -> str:
    """The manifest as JSON."""
    return json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n"


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint's folder.

    Raises:
        Damaged: there is none, or it is invalid.
    """
    try:
        content = read_limited(folder / MANIFEST)
        version = _Version.model_validate_json(content).format
        if version != _FORMAT:
            raise Damaged(f"{MANIFEST} has format {version}, this version reads {_FORMAT}")
        found = _MANIFEST.validate_json(content, strict=True)
    except FileNotFoundError:
        raise Damaged(f"no {MANIFEST}: it was never finished") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise Damaged(f"{MANIFEST} is not a manifest ({first_problem(error)})") from error
    for name in found.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Damaged(f"{MANIFEST} names a file outside the checkpoint: {name!r:.80}")
    return found


def read_limited(path: Path) -> bytes:
    """The content of a small file of a checkpoint.

    Raises:
        OSError: it cannot be read.
        Damaged: it is larger than LARGEST_JSON bytes or not a regular file.
    """
    if path.exists() and not path.is_file():
        raise Damaged(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise Damaged(f"{path.name} is larger than {LARGEST_JSON >> 20} MiB")
    return content


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation on one line, with its key."""
    detail = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, detail["loc"]))
    return f"{key}: {detail['msg']}" if key else detail["msg"]


def check_files(
    folder: Path, files: Mapping[str, FileRecord], names: Iterable[str], checksums: bool
) -> str | None:
    """Describe the first of ``names`` that does not match its record; None if all match.

    Sizes are always compared; ``checksums`` also reads the files.
    """
    for name in names:
        path, record = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != record.size:
                return f"{name} has {size} bytes instead of {record.size}"
            if checksums and record_of(path) != record:
                return f"{name} has another checksum than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
