"""Where a start of a run begins: at update 0, at the run's own checkpoint, or at another run's.

A new run may be a fork, such as a decay branch, of another run; a run may be extended. Collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalr.checkpoint.find import Found, find_checkpoint
from megalr.checkpoint.fork import Fork, load_fork, open_fork
from megalr.checkpoint.load import load_checkpoint
from megalr.config.resuming import Difference
from megalr.config.schema import RunConfig
from megalr.data import TokenDataset
from megalr.distributed.agreement import is_rank0, run_on_rank0
from megalr.errors import UserError
from megalr.models.build import with_sizes
from megalr.run.extension import SchedulePlan, plan_schedule
from megalr.run.folder import CHECKPOINTS, check_run_folder, has_updates


@dataclass(frozen=True)
class Origin:
    """Where a start of a run begins.

    Attributes:
        found: the run's own checkpoint, if it has one.
        fork: the one that a new run starts from, if it is a fork.
        changed: differences from the run in the folder that the user allows.
        plan: the learning rates.
        folder: of the run whose checkpoint is loaded; None if none is.
    """

    found: Found
    fork: Fork | None
    changed: Sequence[Difference]
    plan: SchedulePlan
    folder: Path | None


def find_origin(config: RunConfig, allowed: Sequence[str]) -> Origin:
    """Look for checkpoints to start from, the run's own first. Collective; writes nothing.

    Raises:
        UserError: the folder holds another run, or the checkpoint to fork from does not fit.
    """
    folder = Path(config.run.dir)
    changed = run_on_rank0(lambda: check_run_folder(config, allowed, with_sizes))
    found = find_checkpoint(folder, config.checkpoint.verify)
    if found.tag is None and is_rank0() and has_updates(folder):
        print(
            f"note: run.dir {folder} has updates in its metrics.jsonl but no checkpoint to "
            "go on from: the run begins again",
            flush=True,
        )
    fork = open_fork(config) if found.tag is None else None
    plan = plan_schedule(config, found.tag, fork)
    source = folder if found.tag is not None else None
    return Origin(found, fork, changed, plan, source if fork is None else fork.run)


def resume_from(
    origin: Origin, config: RunConfig, engine: Any, data: TokenDataset
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Load the origin's checkpoint, if there is one.

    Returns:
        The state of the loop to continue from, None to start at update 0; the fields of the
        ``resume`` or ``fork`` event.

    Raises:
        UserError: the run's checkpoint was trained on other data, and no key of the data may
            differ.
    """
    found, changed = origin.found, origin.changed
    if origin.fork is not None:
        saved, forked = load_fork(engine, origin.fork)
        return saved, forked | origin.plan.changed
    if found.tag is None:
        return None, {}
    data_may_differ = any(key.startswith("data.") for key, _, _ in changed)
    loaded = load_checkpoint(engine, Path(config.run.dir), found.tag)
    state = loaded.state
    if state["data_fingerprint"] != data.fingerprint and not data_may_differ:
        raise UserError(
            f"the checkpoint of update {state['update']} was trained on other data (fingerprint "
            f"{state['data_fingerprint'][:12]}, now {data.fingerprint[:12]}): give the same "
            "data.train, or a new run.dir"
        )
    facts = {
        "path": f"{CHECKPOINTS}/{found.tag}",
        "verify_seconds": round(found.seconds, 3),
        "load_seconds": round(loaded.seconds, 3),
        "reshaped": loaded.reshaped,
        "damaged": found.damaged,
        "unfinished": found.unfinished,
        "allowed": [list(difference) for difference in changed],
        **origin.plan.changed,
    }
    return state, facts
