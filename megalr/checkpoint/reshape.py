"""Convert a checkpoint to DeepSpeed's universal layout, without an engine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from megalr.checkpoint.directory import publish, saving_path, universal_tag
from megalr.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    Damaged,
    FileRecord,
    check_files,
    manifest_text,
    record_of,
)
from megalr.checkpoint.reader import Checkpoint
from megalr.checkpoint.source import STATE, StateSource
from megalr.checkpoint.universal import (
    is_universal,
    write_index,
    write_parameter,
    write_tensor_state,
)
from megalr.errors import UserError
from megalr.files import replace_file, system_message

UNIVERSAL_LAYOUT = {"universal": True}
"""Layout in the manifest of a universal folder: equal to that of no engine."""


def write_universal(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write ``<tag>_universal`` beside a checkpoint; one parameter is in memory at a time.

    ``progress`` is called with (parameters done, parameters) after each. The folder is published
    by a rename once it is complete, with the manifest written last.

    Returns:
        The folder.

    Raises:
        UserError: the checkpoint is universal already or damaged, or the disk is full; nothing
            unfinished is left.
    """
    folder = checkpoint.folder
    if is_universal(folder):
        raise UserError(f"{folder} is in the universal layout already: there is nothing to do")
    tag, loss = universal_tag(folder.name), checkpoint.validation_loss
    return write_whole(checkpoint, checkpoint.source, folder.parent, tag, loss, progress)


def write_whole(
    checkpoint: Checkpoint,
    source: StateSource,
    root: Path,
    tag: str,
    validation_loss: float | None,
    progress: Callable[[int, int], None],
) -> Path:
    """Write ``source``, made from the files of ``checkpoint``, as the universal ``root/tag``.

    Published, and failing, as :func:`write_universal`.
    """
    folder, saving = checkpoint.folder, saving_path(root, tag)
    try:
        _check(checkpoint)
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir(parents=True)
        written: list[str] = []
        for done, name in enumerate(source.names()):
            written += write_parameter(source, name, saving)
            progress(done + 1, len(source.names()))
        for logical in source.logical_tensors():
            written += write_tensor_state(source, logical, saving)
        written += write_index(source, saving)
        replace_file(saving / STATE, source.saved.text().encode())
        files: dict[str, FileRecord] = {
            name: record_of(saving / name, durable=True) for name in [*written, STATE]
        }
        manifest = CheckpointManifest(source.saved.update, UNIVERSAL_LAYOUT, validation_loss, files)
        replace_file(saving / MANIFEST, manifest_text(manifest).encode())
        publish(root, tag)
    except Damaged as error:
        raise UserError(f"checkpoint {folder} is damaged ({error}): choose another one") from error
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(saving)
        raise UserError(
            f"{root / tag} could not be written ({system_message(error)}): free space or fix the "
            "path and start again; the checkpoint itself is as it was"
        ) from error
    return root / tag


def _check(checkpoint: Checkpoint) -> None:
    """Compare the checksums of the files that are about to be read."""
    files = checkpoint.manifest.files
    problem = check_files(checkpoint.folder, files, files, checksums=True)
    if problem is not None:
        raise Damaged(problem)
