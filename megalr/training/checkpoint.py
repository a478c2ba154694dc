"""Saving, finding and loading checkpoints; every function is called by all ranks together.

A checkpoint is written under a name that never counts. Only when every rank has written its files
and the manifest lists all of them, it gets its own name, by one rename. See docs/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.checkpoints import folder as names
from megalr.checkpoints.layout import layout_of
from megalr.checkpoints.load import load_source
from megalr.checkpoints.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    check_files,
    manifest_text,
    read_manifest,
    record_of,
)
from megalr.checkpoints.reader import open_source
from megalr.checkpoints.source import STATE, SavedState
from megalr.config.schema import RunConfig
from megalr.distributed.agreement import is_rank0, run_on_all, run_on_rank0
from megalr.errors import AgreedError, UserError
from megalr.restarts.state import ShardedState
from megalr.training.checkpoint_files import as_user_error, reason_of, write_files


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


@dataclass(frozen=True)
class Found:
    """The checkpoint to continue from.

    Attributes:
        tag: its name; None: there is none, the run begins.
        damaged: newer ones that cannot be used, each with what is wrong.
        unfinished: names of those whose writing was cut short; they never counted.
        seconds: the time that looking took.
    """

    tag: str | None
    damaged: list[str]
    unfinished: list[str]
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_checkpoint` brought back.

    Attributes:
        state: what was given to :func:`save_checkpoint`, with ``update``.
        seconds: the time it took.
        reshaped: which parts of the layout differ, as ``{name: [saved, now]}``; empty if the
            engine read its own files.
    """

    state: dict[str, Any]
    seconds: float
    reshaped: dict[str, list[Any]]


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
        records, hashing = write_files(engine, root, saving)
        loss = None if validation_loss is None or math.isnan(validation_loss) else validation_loss
        saved = SavedState(update, config.model_dump(mode="json"), _counters(engine), state)
        text = saved.text()  # on every rank: a value that JSON cannot hold must stop all of them
        manifest = Manifest(update, layout_of(engine), loss, records)
        size = run_on_rank0(lambda: _finish(root, tag, text, manifest))
    deleted, error = run_on_rank0(lambda: delete_superseded(root, config, update))
    seconds = time.perf_counter() - started
    path = f"{names.CHECKPOINTS}/{tag}"
    return SaveReport(path, seconds, hashing, size, deleted, error)


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
    with as_user_error():
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
    with as_user_error():
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
            return deleted, f"{tag}: {reason_of(error)}"
        deleted.append(tag)
    return deleted, None


def find_checkpoint(folder: Path, verify: bool) -> Found:
    """The newest checkpoint of a run that is as it was written; the ranks share the reading.

    Args:
        folder: the run's folder.
        verify: compare checksums as well, not only sizes.

    Raises:
        UserError: there are checkpoints, and none of them is good.
    """
    started = time.perf_counter()
    root = folder / names.CHECKPOINTS
    known, unfinished = run_on_rank0(lambda: _list(root))
    damaged: list[str] = []
    for tag in reversed(known):
        problem = _problem(root / tag, verify)
        if problem is None:
            return Found(tag, damaged, unfinished, time.perf_counter() - started)
        damaged.append(f"{tag}: {problem}")
    if damaged:
        raise AgreedError(
            f"run.dir {folder} has no good checkpoint ({'; '.join(damaged)}): restore one from a "
            "copy, or choose another run.dir to start from the beginning"
        )
    return Found(None, damaged, unfinished, time.perf_counter() - started)


def _list(root: Path) -> tuple[list[str], list[str]]:
    with as_user_error():
        names.recover(root)
        return names.tags(root), names.unfinished(root)


def _problem(folder: Path, verify: bool) -> str | None:
    """What is wrong with a checkpoint; None if it is good. The same on all ranks."""
    manifest, problem = run_on_rank0(lambda: _read_manifest(folder))
    if manifest is None or problem is not None:
        return problem
    if not verify:
        return run_on_rank0(lambda: check_files(folder, manifest.files, manifest.files, False))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
    found: list[Any] = [check_files(folder, manifest.files, largest_first[rank::world], True)]
    if world > 1:
        mine, found = found[0], [None] * world
        dist.all_gather_object(found, mine)
    return next((problem for problem in found if problem is not None), None)


def _read_manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    try:
        return read_manifest(folder), None
    except Damaged as error:
        return None, str(error)


def tidy(folder: Path, found: Found) -> None:
    """Before a run goes on: say what was passed over, remove leftovers, set ``latest``.

    Raises:
        UserError: the folder cannot be written.
    """

    def work() -> None:
        root = folder / names.CHECKPOINTS
        for text in found.damaged:
            print(f"warning: passed over a damaged checkpoint, {text}", file=sys.stderr, flush=True)
        for tag in found.unfinished:
            print(f"warning: {tag} was never finished; removed", file=sys.stderr, flush=True)
        try:
            names.clean(root)
            if found.tag is not None:
                names.point_latest(root, found.tag)
        except OSError as error:
            raise UserError(f"{root} cannot be written: {reason_of(error)}") from error

    run_on_rank0(work)


def load_checkpoint(engine: Any, folder: Path, tag: str) -> Loaded:
    """Load a good checkpoint (:func:`find_checkpoint`) into the engine, whatever shape it has.

    Where layouts are equal the engine reads its own files and continues bitwise; otherwise masters
    and optimizer states are put together from the files and cut anew. Options of the optimizer
    (betas, weight decay, ...) stay those of the engine, not those that were saved.

    Raises:
        UserError: it cannot be loaded into this engine; the reason is named.
    """
    started = time.perf_counter()
    root = folder / names.CHECKPOINTS
    manifest, problem = run_on_rank0(lambda: _read_manifest(root / tag))
    if manifest is None:
        raise AgreedError(f"checkpoint {root / tag} is damaged ({problem}): choose another one")
    now = json.loads(json.dumps(layout_of(engine)))
    different = {
        k: [manifest.layout.get(k), v] for k, v in now.items() if manifest.layout.get(k) != v
    }
    saved = run_on_all(lambda: SavedState.read(root / tag), Damaged)
    options = [dict(group) for group in ShardedState(engine).base.param_groups]
    if different:
        run_on_all(lambda: load_source(engine, open_source(root / tag)), Damaged)
        ShardedState(engine).refresh_weights()
    else:
        path, _ = engine.load_checkpoint(str(root), tag=tag)
        if path is None:
            raise AgreedError(f"checkpoint {root / tag} could not be loaded by DeepSpeed")
    for group, given in zip(ShardedState(engine).base.param_groups, options, strict=True):
        group.update({key: value for key, value in given.items() if key != "params"})
    return Loaded(dict(saved.state, update=saved.update), time.perf_counter() - started, different)
