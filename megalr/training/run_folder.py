"""The folder of a run: what it holds, whether this run may use it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megalr.config.loading import (
    KEYS_FREE_ON_RESUME,
    differences_that_forbid_resume,
    dump_config,
)
from megalr.config.schema import RunConfig
from megalr.errors import UserError

CONFIG = "config.yaml"
DS_CONFIG = "ds_config.json"
CHECKPOINTS = "checkpoints"
RUN_LOCK = ".lock"
"""Kept locked by rank 0 of a running job."""
LAUNCHER_FILES = (RUN_LOCK, "logs", "stop", ".slurm")
"""What a launcher may put into the folder before the run begins."""
COMPLETE = "complete.json"
"""Written last into a checkpoint's folder: without it the checkpoint does not count."""


def checkpoint_tags(folder: Path) -> list[str]:
    """Tags of the finished checkpoints of a run, oldest first.

    A checkpoint is finished when the marker that is written last is there.
    """
    root = folder / CHECKPOINTS
    finished = [p for p in root.glob("update_*") if (p / COMPLETE).is_file()]
    return [p.name for p in sorted(finished, key=lambda p: int(p.name.split("_")[1]))]


def check_run_folder(config: RunConfig) -> str | None:
    """Check the folder against the run, writing nothing; the checkpoint to resume from.

    Called on one rank. ``run.resume`` decides: ``never`` refuses a folder with a run in it,
    ``must`` one without a checkpoint, ``auto`` continues if the configuration is the same.

    Returns:
        Tag of the newest finished checkpoint, None to start from the beginning.

    Raises:
        UserError: the folder holds something else, or another run (the differing keys are named).
    """
    folder = Path(config.run.dir)
    saved = folder / CONFIG
    tags = checkpoint_tags(folder)
    if config.run.resume == "never" and saved.exists():
        raise UserError(
            f"run.dir {folder} already holds a run and run.resume is never: choose another "
            "run.dir, or run.resume=auto to continue it"
        )
    if config.run.resume == "must" and not tags:
        raise UserError(
            f"run.dir {folder} has no finished checkpoint and run.resume is must: check the path, "
            "or run.resume=auto to start"
        )
    if saved.exists():
        _compare(saved, config)
    elif folder.exists() and any(path.name not in LAUNCHER_FILES for path in folder.iterdir()):
        raise UserError(
            f"run.dir {folder} is not empty and holds no {CONFIG}: choose another run.dir"
        )
    return tags[-1] if tags else None


def write_run_folder(config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Make the folder and write the resolved configurations into it; called on one rank.

    Only once everything that can be wrong with the run has been found: a folder claimed by a run
    that never began would refuse its corrected configuration.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(config.run.dir)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, dump_config(config))
        write_atomically(folder / DS_CONFIG, json.dumps(ds_config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written: {error.strerror}") from error


def _compare(saved: Path, config: RunConfig) -> None:
    try:
        values = yaml.safe_load(saved.read_text(encoding="utf-8"))
        old = RunConfig.model_validate(values)
    except (yaml.YAMLError, ValidationError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{saved} cannot be read as a run's configuration ({type(error).__name__}): "
            "choose another run.dir"
        ) from error
    different = differences_that_forbid_resume(old, config)
    if different:
        listed = "; ".join(f"{key}: {before} there, {now} here" for key, before, now in different)
        raise UserError(
            f"run.dir {saved.parent} holds a run with another configuration ({listed}): choose "
            f"another run.dir, or give the same values (free to change: "
            f"{', '.join(KEYS_FREE_ON_RESUME)})"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary name, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def delete_old_checkpoints(folder: Path, keep: int) -> list[str]:
    """Delete all finished checkpoints but the newest ``keep``; return the deleted tags."""
    old = checkpoint_tags(folder)[:-keep]
    for tag in old:
        # The marker goes first: a half-deleted checkpoint must not count as finished.
        (folder / CHECKPOINTS / tag / COMPLETE).unlink()
        shutil.rmtree(folder / CHECKPOINTS / tag)
    return old
