"""The folder of a run: its files, and whether a configuration may use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megalr.checkpoint.directory import CHECKPOINTS, tags
from megalr.config.loading import dump_config, load_run_config
from megalr.config.resuming import (
    KEYS_FREE_ON_RESUME,
    PATH_KEYS,
    Difference,
    allowed_differences,
    differences_that_forbid_resume,
    keys_of_same_folders,
    located,
)
from megalr.config.schema import RunConfig
from megalr.config.yaml_source import read_file
from megalr.errors import UserError
from megalr.files import replace_file

CONFIG = "config.yaml"
STARTED_IN = "# relative paths start from"
"""First line of CONFIG: a comment with the working directory of the run's last start."""
DS_CONFIG = "ds_config.json"
METRICS = "metrics.jsonl"
RUN_LOCK = ".lock"
"""Locked by rank 0 while a job runs."""
LAUNCHER_FILES = (RUN_LOCK, "logs", "stop", ".slurm")
"""Names that a launcher may create in the folder before the run begins."""
Resolve = Callable[[RunConfig], RunConfig]


def check_run_folder(
    config: RunConfig, allowed: Sequence[str] = (), resolve: Resolve = lambda config: config
) -> list[Difference]:
    """Check whether a run may use its folder. Writes nothing; called on one rank.

    ``run.resume``: ``never`` refuses a folder that holds a run, ``must`` one without a checkpoint,
    ``auto`` continues if the configuration is the same except for the keys that are free on resume
    and those that match ``allowed``. The folder of a run that ended before its first update (out
    of memory, say) may be used by any other.

    Args:
        config: the run that is to use the folder.
        allowed: patterns of keys that may differ.
        resolve: fills in what a null stands for, in both configurations before they are compared.

    Returns:
        The differences that ``allowed`` permits.

    Raises:
        UserError: the folder holds something else, or another run (names the differing keys).
    """
    folder = Path(config.run.dir)
    try:
        return _check_run_folder(folder, config, allowed, resolve)
    except OSError as error:
        path = error.filename or folder
        raise UserError(f"run.dir {folder}: {path} cannot be read: {error.strerror}") from error


def _check_run_folder(
    folder: Path, config: RunConfig, allowed: Sequence[str], resolve: Resolve
) -> list[Difference]:
    saved = folder / CONFIG
    if config.run.resume == "never" and saved.exists():
        raise UserError(
            f"run.dir {folder} already holds a run and run.resume is never: choose another "
            "run.dir, or run.resume=auto to continue it"
        )
    if config.run.resume == "must" and not tags(folder / CHECKPOINTS):
        raise UserError(
            f"run.dir {folder} has no finished checkpoint and run.resume is must: check the path, "
            "or run.resume=auto to start"
        )
    if saved.exists():
        if not tags(folder / CHECKPOINTS) and not has_updates(folder):
            return []  # ended before its first update: free for any run
        return _compare(saved, config, allowed, resolve)
    if folder.exists() and not all(_may_precede_a_run(path) for path in folder.iterdir()):
        raise UserError(
            f"run.dir {folder} is not empty and holds no {CONFIG}: choose another run.dir"
        )
    return []


def _may_precede_a_run(path: Path) -> bool:
    """Whether an entry of a run's folder without a configuration is no reason to refuse it.

    Launchers make some; a start that was killed while it claimed the folder leaves others.
    """
    if path.name == CHECKPOINTS and path.is_dir():
        return not any(path.iterdir())
    return path.name in LAUNCHER_FILES or path.name.startswith(f".{CONFIG}.")


def working_directory(folder: Path) -> Path | None:
    """The folder that relative paths in a run's configuration start from; None if unknown.

    A run of a version that did not record it was started where its ``run.dir`` leads to
    ``folder``, if that is relative and the run has not been moved.
    """
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        first = text.split("\n", 1)[0]
        if first.startswith(STARTED_IN):
            return Path(json.loads(first.removeprefix(STARTED_IN)))
        parts = Path(yaml.safe_load(text)["run"]["dir"]).parts
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    found = folder.resolve()
    if Path(*parts).is_absolute() or found.parts[-len(parts) :] != parts:
        return None
    return Path(*found.parts[: -len(parts)])


def has_updates(folder: Path) -> bool:
    """Whether an update was logged in a run's folder."""
    metrics = folder / METRICS
    return metrics.is_file() and b'"event": "step"' in metrics.read_bytes()


def read_config(folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration in a run's folder: values by key by section, not validated further.

    Raises:
        UserError: there is none, or it is not such YAML within the limits of a configuration.
    """
    path = folder / CONFIG
    read_file(path)  # for its limits on size, depth and aliases, and its errors
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot read the configuration of the run ({reason})") from error
    sections = values if isinstance(values, dict) else {}
    if not sections or not all(isinstance(section, dict) for section in sections.values()):
        raise UserError(
            f"{path}: cannot read the configuration of the run: must hold sections with keys below"
        )
    return sections


def stored_config(
    folder: Path, overrides: Sequence[str], presets: Iterable[str] | None = None
) -> RunConfig:
    """The configuration in a run's folder, with overrides, to continue the run from here.

    ``run.dir`` is the folder as given and ``run.resume`` is auto unless it is overridden. Relative
    paths start from the working directory of the run's last start, those of overrides from that of
    this process.

    Raises:
        UserError: the folder holds no run, or the configuration has problems (one line each).
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume {folder}: holds no {CONFIG}: give the folder of a run")
    keys = [text.partition("=")[0].strip() for text in overrides]
    if "run.dir" in keys:
        raise UserError(
            f"run.dir is given with --resume {folder}, which continues the run there: leave it out"
        )
    own = [f"run.dir={json.dumps(str(folder), ensure_ascii=False)}", "run.resume=auto"]
    config = load_run_config([folder / CONFIG], [*own, *overrides], presets)
    given = [key for key in PATH_KEYS if any(f"{text}.".startswith(f"{key}.") for text in keys)]
    start = working_directory(folder)
    return config if start is None else located(config, start, given)


def write_run_folder(config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Create the folder and write the resolved configurations into it; called on one rank.

    To be called after all checks of the run.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = f"{STARTED_IN} {json.dumps(str(Path.cwd()))}\n"
        replace_file(folder / CONFIG, (start + dump_config(config)).encode())
        replace_file(folder / DS_CONFIG, (json.dumps(ds_config, indent=2) + "\n").encode())
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written: {error.strerror}") from error


def _compare(
    saved: Path, config: RunConfig, allowed: Sequence[str], resolve: Resolve
) -> list[Difference]:
    try:
        old = RunConfig.model_validate(read_config(saved.parent))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        raise UserError(
            f"{saved} cannot be read as a run's configuration ({key}: {detail['msg']}): "
            "choose another run.dir"
        ) from error
    same = keys_of_same_folders(old, working_directory(saved.parent), config, Path.cwd())
    old, config = resolve(old), resolve(config)
    different = differences_that_forbid_resume(old, config, [*allowed, *same])
    if different:
        listed = "; ".join(f"{key}: {before} there, {now} here" for key, before, now in different)
        raise UserError(
            f"run.dir {saved.parent} holds a run with another configuration ({listed}): choose "
            "another run.dir, give the same values, or let them change by --allow KEY (free to "
            f"change anyway: {', '.join(KEYS_FREE_ON_RESUME)})"
        )
    return [d for d in allowed_differences(old, config, allowed) if d[0] not in same]
