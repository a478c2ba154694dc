"""The folder ``checkpoints/`` of a run: names, publishing and deleting of checkpoints.

========================  =====================================================================
``update_N``              a finished checkpoint after N updates, renamed to this name when complete
``update_N_universal``    the same in DeepSpeed's universal layout (tools/reshape_checkpoint.py)
``.saving-...``           being written; never counts
``.trash-...``            being deleted; never counts
``latest``                name of the newest finished checkpoint, for DeepSpeed's tools
========================  =====================================================================
"""

from __future__ import annotations

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


def publish(root: Path, tag: str) -> None:
    """Rename what was written at :func:`saving_path` to its tag, replacing an older one."""
    sync_folder(saving_path(root, tag))
    trash = _to_trash(root, tag)
    saving_path(root, tag).rename(root / tag)
    sync_folder(root)
    _remove(trash)


def point_latest(root: Path, tag: str) -> None:
    """Point DeepSpeed's ``latest`` at this checkpoint."""
    replace_file(root / LATEST, tag.encode())


def discard(root: Path, tag: str) -> None:
    """Delete a checkpoint if it exists: renamed first, so that a partly deleted one never counts.

    Raises:
        OSError: the system refused.
    """
    _remove(_to_trash(root, tag))


def recover(root: Path) -> None:
    """Publish the checkpoints that were complete but for the rename when the run was killed."""
    for tag in unfinished(root):
        if (saving_path(root, tag) / MANIFEST).is_file():
            publish(root, tag)


def unfinished(root: Path) -> list[str]:
    """Tags of the checkpoints whose writing was interrupted."""
    return sorted(path.name.removeprefix(_SAVING) for path in root.glob(f"{_SAVING}*"))


def clean(root: Path) -> None:
    """Remove leftovers of interrupted writing and deleting."""
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
