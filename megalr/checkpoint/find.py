"""Finding the checkpoint to resume from. Collective."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.checkpoint import directory
from megalr.checkpoint.manifest import CheckpointManifest, Damaged, check_files, read_manifest
from megalr.checkpoint.source import STATE, SavedState
from megalr.checkpoint.torch_files import load_mapped
from megalr.distributed.agreement import run_on_rank0
from megalr.errors import AgreedError, UserError
from megalr.files import system_message


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from.

    Attributes:
        tag: its name; None if there is none and the run starts from the beginning.
        damaged: newer ones that cannot be used, each with the reason.
        unfinished: names of those whose writing was interrupted.
        seconds: duration of the search.
    """

    tag: str | None
    damaged: list[str]
    unfinished: list[str]
    seconds: float


def find_checkpoint(folder: Path, verify: bool) -> Found:
    """The newest intact checkpoint of a run; the ranks share the reading.

    Args:
        folder: the run's folder.
        verify: compare checksums, not only sizes.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    started = time.perf_counter()
    root = folder / directory.CHECKPOINTS
    known, unfinished = run_on_rank0(lambda: _list(root))
    damaged: list[str] = []
    for tag in reversed(known):
        problem = checkpoint_problem(root / tag, verify)
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
    try:
        directory.recover(root)
        return directory.tags(root), directory.unfinished(root)
    except OSError as error:
        where = error.filename or root
        raise UserError(
            f"{where}: {system_message(error)}; make it readable and writable"
        ) from None


def checkpoint_problem(folder: Path, verify: bool) -> str | None:
    """Why a checkpoint cannot be used; None if it is intact. The same on all ranks. Collective.

    ``verify``: compare checksums, not only sizes; the ranks share the reading.
    """
    manifest, problem = run_on_rank0(lambda: try_manifest(folder))
    if manifest is None or problem is not None:
        return problem
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
    found: list[Any] = [_check_share(folder, manifest, largest_first[rank::world], verify)]
    if world > 1:
        mine, found = found[0], [None] * world
        dist.all_gather_object(found, mine)
    return next((problem for problem in found if problem is not None), None)


def _check_share(
    folder: Path, manifest: CheckpointManifest, names: list[str], verify: bool
) -> str | None:
    """Why the first unusable one of these files cannot be used; None if all can.

    Tensor files are opened as well (their tensors stay unread): one that would have to run code is
    as unusable as a damaged one. So is a state of the wrong types.
    """
    problem = check_files(folder, manifest.files, names, verify)
    if problem is not None:
        return problem
    try:
        for name in names:
            if name.endswith(".pt"):
                load_mapped(folder / name)
            elif name == STATE:
                SavedState.read(folder)
    except Damaged as error:
        return str(error)
    return None


def try_manifest(folder: Path) -> tuple[CheckpointManifest | None, str | None]:
    """The manifest in a checkpoint's folder, or None and what is wrong with it."""
    try:
        return read_manifest(folder), None
    except Damaged as error:
        return None, str(error)


def tidy(folder: Path, found: Found) -> None:
    """Before a run continues: warn of what was passed over, remove leftovers, set ``latest``.

    Raises:
        UserError: the folder cannot be written.
    """

    def work() -> None:
        root = folder / directory.CHECKPOINTS
        for text in found.damaged:
            print(f"warning: passed over a damaged checkpoint, {text}", file=sys.stderr, flush=True)
        for tag in found.unfinished:
            print(f"warning: {tag} was never finished; removed", file=sys.stderr, flush=True)
        try:
            for text in directory.clean(root):
                print(f"warning: leftover not removed, {text}", file=sys.stderr, flush=True)
            if found.tag is not None:
                directory.point_latest(root, found.tag)
        except OSError as error:
            raise UserError(f"{root} cannot be written: {system_message(error)}") from error

    run_on_rank0(work)
