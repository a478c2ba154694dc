"""A new run that starts from another run's checkpoint (``run.fork_from``). Collective.

The source is only read. What a fork takes over must fit: the sizes of the model and the method
always, and what the optimizer's states depend on unless only the weights are taken. All other keys
may differ; they are recorded.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalr.checkpoint.directory import CHECKPOINTS, is_universal_tag, tag_of, tags, universal_tag
from megalr.checkpoint.find import checkpoint_problem
from megalr.checkpoint.load import load_checkpoint, load_weights
from megalr.checkpoint.manifest import Damaged
from megalr.checkpoint.source import SavedState
from megalr.config.base import split_fork
from megalr.config.resuming import (
    Difference,
    differences_that_forbid_fork,
    differences_that_forbid_resume,
)
from megalr.config.schema import RunConfig
from megalr.distributed.agreement import run_on_all, run_on_rank0
from megalr.errors import AgreedError, UserError
from megalr.models.build import has_sparse_indices, sizes_of, with_sizes


@dataclass(frozen=True)
class Fork:
    """The checkpoint that a run starts from.

    Attributes:
        run: folder of the source.
        tag: name of the checkpoint.
        saved: its update, configuration and state of the loop.
        weights_only: whether the optimizer and the data start at update 0.
        changed: keys that differ from the source's, with both values.
    """

    run: Path
    tag: str
    saved: SavedState
    weights_only: bool
    changed: list[Difference]


def open_fork(config: RunConfig) -> Fork | None:
    """The intact checkpoint that ``run.fork_from`` names; None if the run is no fork.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it does not fit this run.
    """
    given = config.run.fork_from
    if given is None:
        return None
    run = Path(split_fork(given)[0])
    tag = run_on_rank0(lambda: _tag(given))
    folder = run / CHECKPOINTS / tag
    problem = checkpoint_problem(folder, config.checkpoint.verify)
    if problem is not None:
        raise AgreedError(
            f"run.fork_from = {given}: checkpoint {folder} is damaged ({problem}): give another "
            f"one as {run}@UPDATE"
        )
    saved = run_on_all(lambda: SavedState.read(folder), Damaged)
    source = run_on_all(saved.run_config, Damaged)
    weights_only = config.run.fork_state == "weights"
    run_on_all(lambda: _check(config, source, saved))
    changed = differences_that_forbid_resume(with_sizes(source), with_sizes(config))
    return Fork(run, tag, saved, weights_only, changed)


def load_fork(engine: Any, fork: Fork) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Load the source's checkpoint into the engine of the new run.

    Returns:
        The state of the loop to continue from, None if it starts at update 0; the fields of the
        ``fork`` event.
    """
    started = time.perf_counter()
    state: dict[str, Any] | None = None
    reshaped: dict[str, list[Any]] = {}
    if fork.weights_only:
        load_weights(engine, fork.run, fork.tag)
    else:
        loaded = load_checkpoint(engine, fork.run, fork.tag)
        state, reshaped = loaded.state, loaded.reshaped
    return state, {
        "path": str(fork.run / CHECKPOINTS / fork.tag),
        "source_update": fork.saved.update,
        "state": "weights" if fork.weights_only else "all",
        "changed": [list(difference) for difference in fork.changed],
        "reshaped": reshaped,
        "load_seconds": round(time.perf_counter() - started, 3),
    }


def _tag(given: str) -> str:
    """Name of the checkpoint; called on one rank."""
    folder, update = split_fork(given)
    known = tags(Path(folder) / CHECKPOINTS)
    if not known:
        raise UserError(
            f"run.fork_from = {given}: {folder} holds no checkpoint: give the folder of a run, or "
            "FOLDER@UPDATE"
        )
    if update is None:
        return known[-1]
    wanted = tag_of(update)
    for tag in (wanted, universal_tag(wanted)):
        if tag in known:
            return tag
    listed = ", ".join(tag for tag in known if not is_universal_tag(tag)) or ", ".join(known)
    raise UserError(f"run.fork_from = {given}: there is no checkpoint {wanted}, but {listed}")


def _check(config: RunConfig, source: RunConfig, saved: SavedState) -> None:
    """Raise UserError unless the checkpoint of ``source`` fits this run."""
    given, weights_only = config.run.fork_from, config.run.fork_state == "weights"
    different = [*_sizes(source, config), *_supports(source, config)]
    different += differences_that_forbid_fork(source, config, weights_only)
    if different:
        listed = "; ".join(f"{key}: {before} there, {now} here" for key, before, now in different)
        ranks = any(key in ("method.rank", "method.ranks") for key, _, _ in different)
        states = any(key.startswith(("optimizer.", "train.")) for key, _, _ in different)
        raise UserError(
            f"run.fork_from = {given}: the checkpoint is of another model, method or optimizer "
            f"({listed}): give the same values"
            + (", or run.fork_state=weights" if states else "")
            + (", or write its weights at other ranks with megalr ranks" if ranks else "")
        )
    if not weights_only and saved.weights_alone:
        raise UserError(f"run.fork_from = {given}: holds weights alone: use run.fork_state=weights")
    if not weights_only and saved.update >= config.train.updates:
        raise UserError(
            f"run.fork_from = {given}: is at update {saved.update}, and train.updates = "
            f"{config.train.updates} leaves none to make: raise it, or fork from an earlier one"
        )


def _sizes(source: RunConfig, config: RunConfig) -> list[Difference]:
    """Sizes and choices of the decoder that differ, however they were given."""
    before, now = (
        {**asdict(sizes), "num_kv_heads": sizes.kv_heads, "head_dim": sizes.head_width}
        for sizes in (sizes_of(source), sizes_of(config))
    )
    return [
        (f"model.{name}", before[name], value)
        for name, value in now.items()
        if before[name] != value and name != "initializer_range"
    ]


def _supports(source: RunConfig, config: RunConfig) -> list[Difference]:
    """Keys by which sparse entries would lie at other positions, which no checkpoint holds."""
    if not has_sparse_indices(config.method):
        return []
    before, now = source.model.from_pretrained, config.model.from_pretrained
    if (before is None) != (now is None):
        return [("model.from_pretrained", before, now)]
    if now is None and source.run.seed != config.run.seed:
        return [("run.seed", source.run.seed, config.run.seed)]
    return []
