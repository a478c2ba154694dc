"""Saving a checkpoint. Collective.

A checkpoint is written under a temporary name. Once every rank has written its files and the
manifest lists them all, one rename publishes it. See docs/checkpoints.md.
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

from megalr.checkpoint import directory
from megalr.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    FileRecord,
    manifest_text,
    record_of,
)
from megalr.checkpoint.retain import delete_superseded
from megalr.checkpoint.source import STATE, SavedState
from megalr.config.schema import RunConfig
from megalr.distributed.agreement import is_rank0, raise_on_any_rank, run_on_rank0
from megalr.engine.checkpoint_files import (
    counters,
    layout_of,
    write_engine_files,
    write_fragments,
)
from megalr.errors import AgreedError, UserError
from megalr.files import replace_file, system_errors, system_message


@dataclass(frozen=True)
class SaveReport:
    """Result of a save: the fields of the ``checkpoint`` event.

    Attributes:
        path: the checkpoint's folder relative to the run's.
        save_seconds: total time, during which training pauses.
        checksum_seconds: of it, checksums and flushing files to the disk; slowest rank.
        bytes: size of all files.
        deleted: older checkpoints that were deleted.
        delete_error: why deleting failed; None if it did not.
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
        config: of the run; ``checkpoint`` configures retention.
        update: updates done.
        state: of the training loop; must survive JSON.
        validation_loss: of the saved model; None if it was not evaluated at this update.

    Raises:
        UserError: the file system refused (disk full, no permission). Older checkpoints are whole,
            and nothing of this one is left.
    """
    started = time.perf_counter()
    root = Path(config.run.dir) / directory.CHECKPOINTS
    tag = directory.tag_of(update)
    saving = directory.saving_path(root, tag)
    with _one_line(root / tag):
        run_on_rank0(lambda: _prepare(root, tag))
        records, hashing = _write_files(engine, root, saving)
        loss = None if validation_loss is None or math.isnan(validation_loss) else validation_loss
        saved = SavedState(update, config.model_dump(mode="json"), counters(engine), state)
        text = saved.text()  # on every rank: a value that JSON cannot hold must fail on all
        manifest = CheckpointManifest(update, layout_of(engine), loss, records)
        size = run_on_rank0(lambda: _finish(root, tag, text, manifest))
    deleted, error = run_on_rank0(lambda: delete_superseded(root, config, update))
    seconds = time.perf_counter() - started
    path = f"{directory.CHECKPOINTS}/{tag}"
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
    """Remove the files of a failed save; the error says that nothing is lost."""
    try:
        yield
    except AgreedError as error:
        if is_rank0():  # leftovers are removed at the next start
            shutil.rmtree(directory.saving_path(path.parent, path.name), ignore_errors=True)
        raise AgreedError(
            f"checkpoint {path} could not be written ({error}): free space or fix the path and "
            "start again; the previous checkpoint is whole"
        ) from error


def _prepare(root: Path, tag: str) -> None:
    with system_errors():
        directory.prepare(root, tag)


def _finish(root: Path, tag: str, state_text: str, manifest: CheckpointManifest) -> int:
    """Write state and manifest, publish; returns the size of all files in bytes. Rank 0 only."""
    saving = directory.saving_path(root, tag)
    with system_errors():
        replace_file(saving / STATE, state_text.encode())
        files = {**manifest.files, STATE: record_of(saving / STATE)}
        manifest = dataclasses.replace(manifest, files=files)
        replace_file(saving / MANIFEST, manifest_text(manifest).encode())
        directory.publish(root, tag)
        directory.point_latest(root, tag)
    return sum(record.size for record in files.values())
