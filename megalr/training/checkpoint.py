"""Saving and resuming through the engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.errors import UserError
from megalr.training.distributed import on_main
from megalr.training.run_folder import (
    CHECKPOINTS,
    COMPLETE,
    delete_old_checkpoints,
    write_atomically,
)


def layout_of(engine: Any) -> dict[str, Any]:
    """What must be equal for the engine's files to fit: ranks, ZeRO stage, precision."""
    return {
        "data_parallel_size": engine.dp_world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "bf16": bool(engine.bfloat16_enabled()),
    }


def save_checkpoint(
    engine: Any, folder: Path, update: int, state: dict[str, Any], keep_last: int
) -> tuple[str, float]:
    """Save the engine after ``update`` updates; every rank must call it.

    The engine writes weights, masters and optimizer state of every rank; ``state`` (plain numbers
    and strings) goes beside them. Only then the marker file is written, only then older
    checkpoints beyond the newest ``keep_last`` are deleted: a crash or a full disk in between
    leaves the previous one.

    Returns:
        The checkpoint's folder relative to the run's, and the seconds it took.

    Raises:
        UserError: the file system refused (disk full, no permission).
    """
    started = time.perf_counter()
    tag = f"update_{update}"
    target = folder / CHECKPOINTS
    try:
        engine.save_checkpoint(str(target), tag=tag, client_state=dict(state, update=update))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {target / tag} could not be written ({_reason(error)}): free space or fix "
            "the path and start again; the previous checkpoint is whole"
        ) from error
    if dist.is_initialized():
        dist.barrier()
    layout = layout_of(engine)

    def finish() -> None:
        record = {"update": update, "layout": layout}
        write_atomically(target / tag / COMPLETE, json.dumps(record, indent=2) + "\n")
        delete_old_checkpoints(folder, keep_last)

    on_main(finish)
    return f"{CHECKPOINTS}/{tag}", time.perf_counter() - started


def _reason(error: Exception) -> str:
    """The operating system's words; torch wraps a failed write in a RuntimeError."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def load_checkpoint(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Load a finished checkpoint into the engine; every rank must call it.

    Returns:
        The state that was given to :func:`save_checkpoint`, with ``update``.

    Raises:
        UserError: it was saved with another number of ranks, ZeRO stage or precision.
    """
    saved = on_main(lambda: json.loads((folder / CHECKPOINTS / tag / COMPLETE).read_text()))
    now = layout_of(engine)
    different = [key for key in now if saved["layout"].get(key) != now[key]]
    if different:
        raise UserError(
            f"checkpoint {tag} was saved with "
            + ", ".join(f"{key} {saved['layout'].get(key)}" for key in different)
            + "; this start has "
            + ", ".join(f"{key} {now[key]}" for key in different)
            + ": start it as it was saved"
        )
    path, state = engine.load_checkpoint(str(folder / CHECKPOINTS), tag=tag)
    if path is None:
        raise UserError(f"checkpoint {folder / CHECKPOINTS / tag} could not be loaded by DeepSpeed")
    return state
