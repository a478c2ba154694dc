"""The events at the start and end of a run; resuming from its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalr.checkpoint.find import Found
from megalr.checkpoint.fork import Fork, load_fork
from megalr.checkpoint.load import load_checkpoint
from megalr.config.resuming import Difference
from megalr.config.schema import RunConfig
from megalr.data import TokenDataset
from megalr.distributed.agreement import is_rank0
from megalr.errors import UserError
from megalr.models.decoder import Decoder
from megalr.models.flops import parameter_count
from megalr.run.folder import CHECKPOINTS, has_updates
from megalr.training.context import RunContext


def start_facts(
    config: RunConfig, ds_config: dict[str, Any], decoder: Decoder, data: TokenDataset
) -> dict[str, Any]:
    """Fields of the ``start`` event; call it before ZeRO-3 shards the parameters."""
    return {
        "model": config.model.preset or config.model.from_pretrained,
        "method": config.method.name,
        "optimizer": config.optimizer.name,
        "parameters": parameter_count(decoder),
        "trainable_parameters": parameter_count(decoder, trainable_only=True),
        "world_size": dist.get_world_size(),
        "data_parallel_size": decoder.plan.mesh.data_size,
        "tensor_parallel_size": decoder.plan.mesh.tensor_size,
        "layout": decoder.plan.layout if decoder.plan.parallel else "none",
        "precision": config.train.precision,
        "zero_stage": ds_config["zero_optimization"]["stage"],
        "train_samples": data.num_samples,
        "train_tokens": data.num_tokens,
    }


def note_lost_checkpoints(folder: Path, found: Found) -> None:
    """Say so if a run's folder has metrics but no checkpoint to continue from."""
    if found.tag is None and is_rank0() and has_updates(folder):
        print(
            f"note: run.dir {folder} has updates in its metrics.jsonl but no checkpoint to "
            "go on from: the run begins again",
            flush=True,
        )


def resume_from(
    found: Found,
    fork: Fork | None,
    config: RunConfig,
    engine: Any,
    data: TokenDataset,
    changed: Sequence[Difference],
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Load the run's checkpoint, or that which it forks from, if there is one.

    ``changed``: differences from the run in the folder that the user allows.

    Returns:
        The state of the loop to continue from, None to start at update 0; the ``resume`` or
        ``fork`` event by its name.

    Raises:
        UserError: the run's checkpoint was trained on other data, and no key of the data may
            differ.
    """
    if fork is not None:
        saved, forked = load_fork(engine, fork)
        return saved, {"fork": forked}
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
    }
    return state, {"resume": facts}


def write_end(
    run: RunContext, seconds: float, train_seconds: float, restart_seconds: float, finished: bool
) -> None:
    """Write the last event of this start, which took ``seconds`` in all.

    ``finished``: whether the run came to its end; else the reason is that of the stop.
    """
    run.metrics.write(
        "end",
        run.progress.update,
        updates=run.progress.update,
        seconds=round(seconds, 3),
        train_seconds=round(train_seconds, 3),
        skipped=run.health.skipped,
        rollbacks=run.health.rollbacks,
        restart_share=restart_seconds / max(train_seconds, 1e-9),
        reason="finished" if finished else run.stop.reason,
    )
