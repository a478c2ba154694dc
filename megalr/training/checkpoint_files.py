"""Every rank writes and hashes its files of a checkpoint; no rank fails alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalr.checkpoints.layout import describe, fragments_file
from megalr.checkpoints.manifest import FileRecord, record_of
from megalr.distributed.agreement import raise_on_any_rank
from megalr.errors import UserError


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """The system's words instead of a traceback, for code that runs on one rank alone."""
    try:
        yield
    except OSError as error:
        raise UserError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """The operating system's words; torch wraps a failed write in a RuntimeError."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def write_files(engine: Any, root: Path, saving: Path) -> tuple[dict[str, FileRecord], float]:
    """Have every rank write and hash its files; records of all ranks' files and the seconds.

    Raises:
        AgreedError: some rank could not.
    """
    error, written = _engine_files(engine, root, saving)
    records: dict[str, FileRecord] = {}
    seconds = 0.0
    if error is None:
        try:
            written += _fragments(engine, saving)
            started = time.perf_counter()
            for path in written:
                records[str(path.relative_to(saving))] = record_of(path, durable=True)
            seconds = time.perf_counter() - started
        except (OSError, RuntimeError) as caught:
            error = caught
    raise_on_any_rank(None if error is None else UserError(reason_of(error)))
    gathered: list[Any] = [(records, seconds)]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (records, seconds))
    together = {name: record for part, _ in gathered for name, record in part.items()}
    return together, max(spent for _, spent in gathered)


def _engine_files(engine: Any, root: Path, saving: Path) -> tuple[Exception | None, list[Path]]:
    """Have the engine write its files; the first error here and the files of this rank.

    Inside ``save_checkpoint`` ranks wait for each other, so none may leave it by an exception:
    errors of writing are kept until all ranks are out.
    """
    errors: list[Exception] = []
    written: list[Path] = []
    plain, copy_scripts = engine.checkpoint_engine.save, engine._copy_recovery_script

    def save(state_dict: Any, path: str) -> None:
        try:
            if not errors:
                plain(state_dict, path)
                written.append(Path(path))
        except (OSError, RuntimeError) as error:
            errors.append(error)

    def copy(folder: str) -> None:
        try:
            copy_scripts(folder)
        except OSError as error:
            errors.append(error)

    engine.checkpoint_engine.save, engine._copy_recovery_script = save, copy
    try:
        engine.save_checkpoint(str(root), tag=saving.name, save_latest=False)
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script
    return (errors[0] if errors else None), written


def _fragments(engine: Any, saving: Path) -> list[Path]:
    """Write the description of this rank's files, unless another rank's files hold the same."""
    data_rank = dist.get_rank(engine.seq_data_parallel_group) if dist.is_initialized() else 0
    if engine.zero_optimization_stage() == 0 and data_rank > 0:
        return []
    tensor_rank = engine.mpu.get_model_parallel_rank() if engine.mpu is not None else 0
    path = saving / fragments_file(data_rank, tensor_rank)
    torch.save(describe(engine), path)
    return [path]
