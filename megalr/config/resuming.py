"""Which keys of the configuration may differ when a run is resumed, and where its paths lead.

Relative paths in the configuration of a run start from the working directory of its start. Whoever
reads it from elsewhere (a resume, an export, an evaluation) turns them into paths that lead there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from os.path import normpath
from pathlib import Path
from typing import Any

from megalr.config.base import split_fork
from megalr.config.loading import flatten
from megalr.config.problems import known_keys, nearest
from megalr.config.schema import RunConfig
from megalr.errors import UserError

ABSENT = "(not set)"
"""Stands in ``diff_configs`` for the value of a key that one of the two runs does not have."""

Difference = tuple[str, Any, Any]
"""Dotted key, value of the run in the folder, value given now."""

KEYS_FREE_ON_RESUME = (
    "run.dir",
    "run.resume",
    "run.fork_from",
    "run.fork_state",
    "schedule.on_extend",
    "run.timeout_seconds",
    "data.validation",
    "data.prefetch_updates",
    "train.micro_batch_size",
    "train.gradient_accumulation",
    "train.compile",
    "train.cuda_graphs",
    "train.activation_checkpointing",
    "train.kernels",
    "parallel.*",
    "evaluation.*",
    "checkpoint.*",
    "health.*",
    "log.*",
)
"""Patterns of the keys that may differ when a run is resumed: they change where and how often
things are written or evaluated, or how a batch or the model is split and computed. The
batches, the learning rates and the algebra stay those of the run; train.* and parallel.* change
the rounding."""

KEYS_FIXED = {
    "run.seed": "the order of the data and the frozen parts of the model follow from it",
    "model.*": "the weights in the checkpoint are of that model",
    "method.name": "the weights in the checkpoint are those of that method",
    "method.ranks": "the weights in the checkpoint have those sizes",
    "method.rank": "the weights or optimizer states in the checkpoint have that size",
    "method.dlr_alpha": "the factors in the checkpoint belong to that offset",
    "method.lr_transfer": "the weights in the checkpoint are scaled by it",
    "method.targets": "the weights in the checkpoint are factorized there",
    "method.density": "the weights in the checkpoint have that support",
    "method.proj_type": "the optimizer states in the checkpoint have that shape",
    "method.state_bits": "the optimizer states in the checkpoint have that form",
    "method.proj": "the optimizer states in the checkpoint are projected by it",
    "optimizer.name": "the optimizer states in the checkpoint are of that rule",
    "optimizer.lr_ratio": "the optimizer states in the checkpoint are grouped by it",
    "optimizer.weight_decay_ratio": "the optimizer states in the checkpoint are grouped by it",
    "optimizer.density": "the optimizer states in the checkpoint have that mask",
    "train.precision": "the weights and optimizer states in the checkpoint have that dtype",
}
"""Patterns of the keys that no run can change, with the reason."""

PATH_KEYS = ("run.fork_from", "model.from_pretrained", "data.train", "data.validation")
"""Keys whose values name folders that a run reads."""


def diff_configs(old: RunConfig, new: RunConfig) -> list[Difference]:
    """(dotted key, old, new) wherever the values differ; ABSENT where a run has no such key."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [
        (key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in keys
        if not _is_same(before.get(key, ABSENT), after.get(key, ABSENT))
    ]


def _is_same(old: Any, new: Any) -> bool:
    """Whether two values are equal, mappings with their order: of ranks the last entry counts."""
    if isinstance(old, dict) and isinstance(new, dict):
        return list(old.items()) == list(new.items())
    return bool(old == new)


def differences_that_forbid_resume(
    old: RunConfig, new: RunConfig, allowed: Iterable[str] = ()
) -> list[Difference]:
    """The part of ``diff_configs`` that neither KEYS_FREE_ON_RESUME nor ``allowed`` covers."""
    free = [*KEYS_FREE_ON_RESUME, *allowed]
    return [
        difference for difference in diff_configs(old, new) if not _matches(difference[0], free)
    ]


def allowed_differences(old: RunConfig, new: RunConfig, allowed: Iterable[str]) -> list[Difference]:
    """The part of ``diff_configs`` that is there because ``allowed`` says so."""
    return [
        difference
        for difference in differences_that_forbid_resume(old, new)
        if _matches(difference[0], allowed)
    ]


def differences_that_forbid_fork(
    old: RunConfig, new: RunConfig, weights_only: bool
) -> list[Difference]:
    """The part of ``diff_configs`` that no fork can have: keys of the method and, unless it takes
    ``weights_only``, those that the optimizer's states depend on. The model is not compared here.
    """
    patterns = ["method.*"]
    if not weights_only:
        patterns += [key for key in KEYS_FIXED if key.startswith(("optimizer.", "train."))]
    return [found for found in diff_configs(old, new) if _matches(found[0], patterns)]


def check_allowed(allowed: Sequence[str]) -> None:
    """Check what ``--allow`` lists: dotted keys, or ``section.*`` for a section's free-able keys.

    Raises:
        UserError: a key that does not exist (with the nearest), or one that cannot change.
    """
    known = known_keys(RunConfig)
    for key in allowed:
        if not any(fnmatchcase(name, key) for name in known):
            close = nearest(key, known)
            hint = f"; did you mean {close}?" if close else ""
            raise UserError(f"--allow {key}: unknown key{hint}")
        for pattern, reason in KEYS_FIXED.items():
            if fnmatchcase(key, pattern) or fnmatchcase(pattern, key):
                raise UserError(
                    f"--allow {key}: {pattern} cannot change in a run: {reason}; start a new "
                    "run.dir, or allow other keys one by one"
                )


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def map_paths(
    config: RunConfig, change: Callable[[str], str], but: Iterable[str] = ()
) -> RunConfig:
    """The configuration with ``change`` applied to every path in it, except in the keys ``but``."""
    run, model, data = config.run, config.model, config.data
    values: dict[str, dict[str, Any]] = {"run": {}, "model": {}, "data": {}}
    if run.fork_from is not None:
        source = split_fork(run.fork_from)[0]
        values["run"]["fork_from"] = change(source) + run.fork_from[len(source) :]
    if model.from_pretrained is not None:
        values["model"]["from_pretrained"] = change(model.from_pretrained)
    sources = [s.model_copy(update={"path": change(s.path)}) for s in data.train]
    values["data"]["train"] = tuple(sources)
    if isinstance(data.validation, dict):
        sets = {name: tuple(map(change, paths)) for name, paths in data.validation.items()}
        values["data"]["validation"] = sets
    elif data.validation is not None:
        values["data"]["validation"] = tuple(map(change, data.validation))
    kept = set(but)
    sections = {
        section: getattr(config, section).model_copy(
            update={name: new for name, new in found.items() if f"{section}.{name}" not in kept}
        )
        for section, found in values.items()
    }
    return config.model_copy(update=sections)


def located(config: RunConfig, start: Path, but: Iterable[str] = ()) -> RunConfig:
    """The configuration with relative paths starting from ``start``, except in the keys ``but``.

    A path that leads nowhere from there and somewhere from this process's working directory is
    kept: the run was moved together with its data.
    """

    def change(path: str) -> str:
        return path if Path(path).exists() and not (start / path).exists() else str(start / path)

    return config if start == Path.cwd() else map_paths(config, change, but)


def keys_of_same_folders(
    old: RunConfig, old_start: Path | None, new: RunConfig, new_start: Path
) -> list[str]:
    """The keys of paths whose values, written differently or not, lead to the same folders.

    ``old_start`` is None if it is not known where the old paths start: then only equal text counts.
    """
    if old_start is None:
        old_start = new_start
    before = flatten(map_paths(old, lambda path: normpath(old_start / path)))
    after = flatten(map_paths(new, lambda path: normpath(new_start / path)))
    return [key for key in PATH_KEYS if before.get(key) == after.get(key)]
