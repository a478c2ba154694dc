"""The folder ``checkpoints/`` of a run: names, publishing and deleting of checkpoints.

========================  =====================================================================
``update_N``              a finished checkpoint after N updates, renamed to this name when complete
``update_N_universal``    the same in DeepSpeed's universal layout (``megalr reshape``)
``.saving-...``           being written; never counts
``.trash-...``            being deleted; never counts
``latest``                name of the newest finished checkpoint, for DeepSpeed's tools
========================  =====================================================================
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megalr.checkpoint.manifest import MANIFEST
from megalr.files import replace_file, sync_folder

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
    """Names of the checkpoints in ``checkpoints/``, oldest first; their content is not checked.

    A checkpoint sorts after its universal folder (counts as newer).
    """
    if not root.is_dir():
        return []
    found = [(m, path) for path in root.iterdir() if (m := _TAG.fullmatch(path.name))]
    ordered = sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))
    return [path.name for _, path in ordered if path.is_dir()]


def saving_path(root: Path, tag: str) -> Path:
    """Path at which a checkpoint is written before it is published."""
    return root / f"{_SAVING}{tag}"


def prepare(root: Path, tag: str) -> Path:
    """Make the empty folder in which a checkpoint is written; what is there is moved away."""
    path = saving_path(root, tag)
    root.mkdir(parents=True, exist_ok=True)
    _try_to_remove(_to_trash(path))
    path.mkdir()
    return path


def publish(root: Path, tag: str) -> None:
    """Rename what was written at :func:`saving_path` to its tag, replacing an older one.

    An older one that cannot be removed stays as trash.
    """
    sync_folder(saving_path(root, tag))
    trash = _to_trash(root / tag)
    saving_path(root, tag).rename(root / tag)
    sync_folder(root)
    _try_to_remove(trash)


def point_latest(root: Path, tag: str) -> None:
    """Point DeepSpeed's ``latest`` at this checkpoint."""
    replace_file(root / LATEST, tag.encode())


def discard(root: Path, tag: str) -> None:
    """Delete a checkpoint if it exists: renamed first, so that a partly deleted one never counts.

    Raises:
        OSError: the system refused.
    """
    _remove(_to_trash(root / tag))


def recover(root: Path) -> None:
    """Publish the checkpoints that were complete but for the rename when the run was killed."""
    for tag in unfinished(root):
        if (saving_path(root, tag) / MANIFEST).is_file():
            publish(root, tag)


def unfinished(root: Path) -> list[str]:
    """Tags of the checkpoints whose writing was interrupted."""
    return sorted(path.name.removeprefix(_SAVING) for path in root.glob(f"{_SAVING}*"))


def clean(root: Path) -> list[str]:
    """Remove leftovers of interrupted writing and deleting.

    Returns:
        Those that could not be removed, each with the reason; they never count as checkpoints.
    """
    failures = []
    for pattern in (f"{_SAVING}*", f"{_TRASH}*"):
        for path in sorted(root.glob(pattern)):
            error = _try_to_remove(path)
            if error is not None:
                failures.append(f"{path}: {error.strerror}")
    return failures


def _to_trash(path: Path) -> Path:
    """Rename a checkpoint so that it no longer counts; its new path, absent if it was absent."""
    tag = path.name.removeprefix(_SAVING)
    trash = path.with_name(f"{_TRASH}{tag}")
    number = 1
    while os.path.lexists(trash):  # left by a deletion that failed
        trash = path.with_name(f"{_TRASH}{tag}-{number}")
        number += 1
    if os.path.lexists(path):
        path.rename(trash)
    return trash


def _try_to_remove(path: Path) -> OSError | None:
    try:
        _remove(path)
    except OSError as error:
        return error
    return None


def _remove(path: Path) -> None:
    """Delete a folder, or a file or link without following it; nothing if it is absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
