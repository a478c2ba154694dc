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
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 22  # bytes read at a time


class Damaged(ValueError):
    """A checkpoint or one of its files is not as it was written; the message says how."""


@dataclass(frozen=True)
class FileRecord:
    """Size (bytes) and CRC-32 of a file."""

    size: int
    crc32: int


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

    update: int
    layout: dict[str, Any]
    validation_loss: float | None
    files: dict[str, FileRecord]


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
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise Damaged(f"{MANIFEST} has format {values['format']}, this version reads {_FORMAT}")
        files = {name: FileRecord(**record) for name, record in values["files"].items()}
        return CheckpointManifest(
            int(values["update"]), dict(values["layout"]), values["validation_loss"], files
        )
    except FileNotFoundError:
        raise Damaged(f"no {MANIFEST}: it was never finished") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{MANIFEST} is not a manifest ({type(error).__name__})") from error


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
