"""Retention: which checkpoints to keep, and deleting the others."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.checkpoint import directory
from megalr.checkpoint.manifest import Damaged, read_manifest
from megalr.config.schema import RunConfig
from megalr.files import system_message


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as retention sees it."""

    tag: str
    update: int
    validation_loss: float | None


def superseded(
    checkpoints: Sequence[Candidate], keep_last: int, keep_every: int, keep_best: int
) -> list[str]:
    """Tags that may be deleted.

    Kept are the newest ``keep_last``, those at a multiple of ``keep_every`` updates (0: none) and
    the ``keep_best`` ones with the lowest validation loss, the oldest among equals.
    """
    ordered = sorted(checkpoints, key=lambda c: c.update)
    kept = {c.tag for c in ordered[-keep_last:]}
    kept |= {c.tag for c in ordered if keep_every and c.update % keep_every == 0}
    judged = [c for c in ordered if c.validation_loss is not None]
    best = sorted(judged, key=lambda c: c.validation_loss or 0.0)
    kept |= {c.tag for c in best[:keep_best]}
    return [c.tag for c in ordered if c.tag not in kept]


def delete_superseded(root: Path, config: RunConfig, update: int) -> tuple[list[str], str | None]:
    """Delete the checkpoints that retention drops after the save at ``update``. Rank 0 only.

    Checkpoints of later updates were damaged when the run resumed, so they must not count among
    the newest. A failure does not end the run.

    Returns:
        Tags deleted, and why deleting failed (None if it did not).
    """
    known = []
    for tag in directory.tags(root):
        with contextlib.suppress(Damaged):
            manifest = read_manifest(root / tag)
            if manifest.update <= update and not directory.is_universal_tag(tag):
                known.append(Candidate(tag, manifest.update, manifest.validation_loss))
    keep = config.checkpoint
    deleted: list[str] = []
    failures: list[str] = []
    for tag in superseded(known, keep.keep_last, keep.keep_every, keep.keep_best):
        try:
            directory.discard(root, tag)
            deleted.append(tag)
        except OSError as error:
            failures.append(f"{tag}: {system_message(error)} ({error.filename or root / tag})")
    return deleted, "; ".join(failures) or None
