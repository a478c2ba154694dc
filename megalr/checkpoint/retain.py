"""The folder ``checkpoints/`` of a run: names, publishing, deleting, which ones to keep.

========================  =====================================================================
``update_N``              a finished checkpoint after N updates; the name appears by a rename,
                          when everything is in it
``update_N_universal``    the same in DeepSpeed's universal layout (tools/reshape_checkpoint.py)
``.saving-...``           being written; never counts
``.trash-...``            being deleted; never counts
``latest``                name of the newest finished one, for DeepSpeed's own tools
========================  =====================================================================
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.checkpoint.manifest import MANIFEST

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_TAG = re.compile(r"update_(\d+)(_universal)?")
_SAVING, _TRASH = ".saving-", ".trash-"


def tag_of(update: int) -> str:
    """Name of the checkpoint after ``update`` updates."""
    return f"update_{update}"


def universal_tag(tag: str) -> str:
    """Name of the universal folder made from a checkpoint."""
    return f"{tag}_universal"


def is_universal_tag(tag: str) -> bool:
    """Whether it is the name of a universal folder."""
    return tag.endswith(universal_tag(""))


def tags(root: Path) -> list[str]:
    """Names of the checkpoints in ``checkpoints/``, oldest first; not looked into.

    Where both exist the checkpoint itself comes after (counts as newer than) its universal folder.
    """
    if not root.is_dir():
        return []
    found = [(m, path) for path in root.iterdir() if (m := _TAG.fullmatch(path.name))]
    ordered = sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))
    return [path.name for _, path in ordered if path.is_dir()]


def saving_path(root: Path, tag: str) -> Path:
    """Where a checkpoint is written before it has its name."""
    return root / f"{_SAVING}{tag}"


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary name, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def publish(root: Path, tag: str) -> None:
    """Give what was written at :func:`saving_path` its name, in place of an older one."""
    _sync_folder(saving_path(root, tag))
    trash = _to_trash(root, tag)
    saving_path(root, tag).rename(root / tag)
    _sync_folder(root)
    _remove(trash)


def point_latest(root: Path, tag: str) -> None:
    """Make DeepSpeed's ``latest`` name this checkpoint."""
    write_atomically(root / LATEST, tag)


def discard(root: Path, tag: str) -> None:
    """Delete a checkpoint if there is one: it loses its name first, so no half of it ever counts.

    Raises:
        OSError: the system refused.
    """
    _remove(_to_trash(root, tag))


def recover(root: Path) -> None:
    """Name the checkpoints that lacked nothing but their name when writing was cut short."""
    for tag in unfinished(root):
        if (saving_path(root, tag) / MANIFEST).is_file():
            publish(root, tag)


def unfinished(root: Path) -> list[str]:
    """Names of the checkpoints whose writing was cut short."""
    return sorted(path.name.removeprefix(_SAVING) for path in root.glob(f"{_SAVING}*"))


def clean(root: Path) -> None:
    """Remove what interrupted writing and deleting left behind."""
    for pattern in (f"{_SAVING}*", f"{_TRASH}*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def _to_trash(root: Path, tag: str) -> Path:
    trash = root / f"{_TRASH}{tag}"
    _remove(trash)
    if (root / tag).exists():
        (root / tag).rename(trash)
    return trash


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


@dataclass(frozen=True)
class Kept:
    """What retention knows of a checkpoint."""

    tag: str
    update: int
    validation_loss: float | None


def superseded(
    checkpoints: Sequence[Kept], keep_last: int, keep_every: int, keep_best: int
) -> list[str]:
    """Tags that may be deleted.

    Kept are the newest ``keep_last``, those at a multiple of ``keep_every`` updates (0: none) and
    the ``keep_best`` ones with the lowest validation loss, of equal ones the oldest.
    """
    ordered = sorted(checkpoints, key=lambda c: c.update)
    kept = {c.tag for c in ordered[-keep_last:]}
    kept |= {c.tag for c in ordered if keep_every and c.update % keep_every == 0}
    judged = [c for c in ordered if c.validation_loss is not None]
    best = sorted(judged, key=lambda c: c.validation_loss or 0.0)
    kept |= {c.tag for c in best[:keep_best]}
    return [c.tag for c in ordered if c.tag not in kept]


def _sync_folder(path: Path) -> None:
    """Have the system write a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
