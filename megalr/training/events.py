"""The events at the start and end of a run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.data import TokenDataset
from megalr.hf.init_from_pretrained import Imported
from megalr.models.decoder import Decoder
from megalr.models.flops import parameter_count
from megalr.run.metrics_writer import MetricsWriter
from megalr.run.origin import Origin
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
        "vocab_size": decoder.config.vocab_size,
        "tokenizer_ids": data.vocab_size,
    }


def write_start(
    metrics: MetricsWriter,
    update: int,
    facts: dict[str, Any],
    imported: Imported | None,
    origin: Origin,
    loaded: dict[str, Any],
) -> None:
    """Write the ``start`` event with its ``facts``, then where the weights come from."""
    metrics.write("start", update, **facts)
    if imported is not None:
        metrics.write("import", update, **imported.metrics())
    elif origin.fork is not None:
        metrics.write("fork", update, **loaded)
    elif loaded:
        metrics.write("resume", update, **loaded)


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
