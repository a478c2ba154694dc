"""The engine's own files of a checkpoint: no rank fails alone writing, no code runs reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.engine.checkpoint_layout import describe_files, fragments_file
from megalr.engine.torch_pickle import system_error, unpickle, write_tensors
from megalr.engine.wrappers import wrapper_of

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def read_engine_files(engine: Any, root: Path, tag: str) -> bool:
    """Have the engine load its own files of ``root/tag``; False if it found none. Collective."""

    def load(path: str, map_location: Any = None) -> Any:
        return unpickle(path)  # to the CPU, as for every map_location that the engine passes

    engine.checkpoint_engine.load = load
    try:
        path, _ = engine.load_checkpoint(str(root), tag=tag)
    finally:
        del engine.checkpoint_engine.load
    return path is not None


def write_engine_files(
    engine: Any, root: Path, saving: Path
) -> tuple[Exception | None, list[Path]]:
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
            errors.append(system_error(error, path))

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


def write_fragments(engine: Any, saving: Path) -> list[Path]:
    """Write the description of this rank's files, unless another rank's files hold the same."""
    data_rank = dist.get_rank(engine.seq_data_parallel_group) if dist.is_initialized() else 0
    if wrapper_of(engine).replicated and data_rank > 0:
        return []
    tensor_rank = engine.mpu.get_model_parallel_rank() if engine.mpu is not None else 0
    path = saving / fragments_file(data_rank, tensor_rank)
    write_tensors(describe_files(engine), path)
    return [path]


def counters(engine: Any) -> dict[str, int]:
    """The engine's own counts of steps and samples."""
    return {name: getattr(engine, name) for name in COUNTERS}


def set_counters(engine: Any, saved: dict[str, int]) -> None:
    """Continue the engine's counts from those of :func:`counters`."""
    for name in COUNTERS:
        setattr(engine, name, saved[name])
