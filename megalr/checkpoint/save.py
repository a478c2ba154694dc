"""Saving a checkpoint and deleting superseded ones; every function is called by all ranks together.

A checkpoint is written under a name that never counts. Only when every rank has written its files
and the manifest lists all of them, it gets its own name, by one rename. See docs/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.checkpoint import retain as names
from megalr.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    FileRecord,
    Manifest,
    manifest_text,
    read_manifest,
    record_of,
)
from megalr.checkpoint.source import STATE, SavedState
from megalr.config.schema import RunConfig
from megalr.distributed.agreement import is_rank0, raise_on_any_rank, run_on_rank0
from megalr.engine.checkpoint_files import write_engine_files, write_fragments
from megalr.engine.checkpoint_layout import layout_of
from megalr.errors import AgreedError, UserError
from megalr.files import system_errors, system_message


@dataclass(frozen=True)
class SaveReport:
    """What a save did; the fields of the ``checkpoint`` event.

    Attributes:
        path: the checkpoint's folder relative to the run's.
        save_seconds: all of it, training standing still.
        checksum_seconds: the part for checksums and for flushing files to the disk, slowest rank.
        bytes: of all files.
        deleted: older checkpoints that were deleted.
        delete_error: why deleting them failed; None: it did not.
    """

    path: str
    save_seconds: float
    checksum_seconds: float
    bytes: int
    deleted: list[str]
    delete_error: str | None


def save_checkpoint(
    engine: Any,
    config: RunConfig,
    update: int,
    state: dict[str, Any],
    validation_loss: float | None = None,
) -> SaveReport:
    """Save the engine after ``update`` updates into ``run.dir``; delete superseded checkpoints.

    Args:
        engine: DeepSpeed's engine; it writes weights, masters and optimizer state of every rank.
        config: the run; ``checkpoint`` says which older ones are kept.
        update: updates done.
        state: what the loop has to remember; it must survive JSON.
        validation_loss: of the model being saved; None if it was not evaluated.

    Raises:
        UserError: the file system refused (disk full, no permission). Older checkpoints are whole,
            and nothing of this one is left.
    """
    started = time.perf_counter()
    root = Path(config.run.dir) / names.CHECKPOINTS
    tag = names.tag_of(update)
    saving = names.saving_path(root, tag)
    with _one_line(root / tag):
        run_on_rank0(lambda: _prepare(saving))
        records, hashing = _write_files(engine, root, saving)
        loss = None if validation_loss is None or math.isnan(validation_loss) else validation_loss
        saved = SavedState(update, config.model_dump(mode="json"), _counters(engine), state)
        text = saved.text()  # on every rank: a value that JSON cannot hold must stop all of them
        manifest = Manifest(update, layout_of(engine), loss, records)
        size = run_on_rank0(lambda: _finish(root, tag, text, manifest))
    deleted, error = run_on_rank0(lambda: delete_superseded(root, config, update))
    seconds = time.perf_counter() - started
    path = f"{names.CHECKPOINTS}/{tag}"
    return SaveReport(path, seconds, hashing, size, deleted, error)


def _write_files(engine: Any, root: Path, saving: Path) -> tuple[dict[str, FileRecord], float]:
    """Have every rank write and hash its files; records of all ranks' files and the seconds.

    Raises:
        AgreedError: some rank could not.
    """
    error, written = write_engine_files(engine, root, saving)
    records: dict[str, FileRecord] = {}
    seconds = 0.0
    if error is None:
        try:
            written += write_fragments(engine, saving)
            started = time.perf_counter()
            for path in written:
                records[str(path.relative_to(saving))] = record_of(path, durable=True)
            seconds = time.perf_counter() - started
        except (OSError, RuntimeError) as caught:
            error = caught
    raise_on_any_rank(None if error is None else UserError(system_message(error)))
    gathered: list[Any] = [(records, seconds)]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (records, seconds))
    together = {name: record for part, _ in gathered for name, record in part.items()}
    return together, max(spent for _, spent in gathered)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Remove what a failed save left and say that nothing is lost."""
    try:
        yield
    except AgreedError as error:
        if is_rank0():  # what cannot be removed now is removed at the next start
            shutil.rmtree(names.saving_path(path.parent, path.name), ignore_errors=True)
        raise AgreedError(
            f"checkpoint {path} could not be written ({error}): free space or fix the path and "
            "start again; the previous checkpoint is whole"
        ) from error


def _prepare(saving: Path) -> None:
    with system_errors():
        if saving.exists():
            shutil.rmtree(saving)
        saving.mkdir(parents=True)


def _counters(engine: Any) -> dict[str, int]:
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
    }


def _finish(root: Path, tag: str, state_text: str, manifest: Manifest) -> int:
    """Write state and manifest, give the checkpoint its name; bytes of all files. Rank 0 only."""
    saving = names.saving_path(root, tag)
    with system_errors():
        names.write_atomically(saving / STATE, state_text)
        files = {**manifest.files, STATE: record_of(saving / STATE)}
        manifest = dataclasses.replace(manifest, files=files)
        names.write_atomically(saving / MANIFEST, manifest_text(manifest))
        names.publish(root, tag)
        names.point_latest(root, tag)
    return sum(record.size for record in files.values())


def delete_superseded(root: Path, config: RunConfig, update: int) -> tuple[list[str], str | None]:
    """Delete what retention no longer keeps after the save at ``update``; rank 0 only.

    Checkpoints of later updates are none of this run's: they were damaged when it began, so they
    must not count among the newest. A failure is returned, it does not end the run.
    """
    known = []
    for tag in names.tags(root):
        with contextlib.suppress(Damaged):
            manifest = read_manifest(root / tag)
            if manifest.update <= update and not names.is_universal_tag(tag):
                known.append(names.Kept(tag, manifest.update, manifest.validation_loss))
    keep = config.checkpoint
    deleted: list[str] = []
    for tag in names.superseded(known, keep.keep_last, keep.keep_every, keep.keep_best):
        try:
            names.discard(root, tag)
        except OSError as error:
            return deleted, f"{tag}: {system_message(error)}"
        deleted.append(tag)
    return deleted, None
