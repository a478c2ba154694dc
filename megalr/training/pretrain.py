"""One pretraining run from its configuration to its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalr.checkpoint.find import Found, find_checkpoint, tidy
from megalr.checkpoint.load import load_checkpoint
from megalr.config.schema import RunConfig
from megalr.data import (
    EvaluationBatches,
    TokenDataset,
    UpdateLoader,
    check_same_tokenizer,
    check_vocabulary,
    has_validation_split,
    open_training_data,
    open_validation_data,
)
from megalr.distributed.agreement import is_rank0, run_on_all, run_on_rank0
from megalr.distributed.process_group import limit_collectives, start_distributed
from megalr.distributed.signals import STOPPED, StopRequest
from megalr.distributed.stop_vote import StopVote
from megalr.distributed.watchdog import Watchdog
from megalr.engine.build import build_engine
from megalr.engine.config import resolve_deepspeed_config
from megalr.errors import AgreedError, UserError
from megalr.hf.init_from_pretrained import (
    check_pretrained_tokenizer,
    initial_model,
    with_pretrained_sizes,
    write_supports,
)
from megalr.layers.lora import LoRALinear
from megalr.models.build import sizes_of
from megalr.models.decoder import Decoder
from megalr.models.flops import parameter_count
from megalr.optim.schedules import make_schedule
from megalr.restarts.controller import Restarts
from megalr.restarts.relora import Relora
from megalr.run.environment import check_ranks_agree, report, versions
from megalr.run.folder import (
    CHECKPOINTS,
    check_run_folder,
    has_updates,
    write_run_folder,
)
from megalr.run.lock import run_folder_lock
from megalr.run.metrics_writer import MetricsWriter
from megalr.tensor_parallel.mesh import Mesh, make_mesh
from megalr.training.device import CompileClock
from megalr.training.progress import TrainProgress
from megalr.training.trainer import Trainer


def pretrain(
    config: RunConfig,
    ds_user: dict[str, Any],
    ds_source: str,
    request: StopRequest | None = None,
    allowed: Sequence[str] = (),
) -> int:
    """Run the configuration on all ranks of the world, from its newest checkpoint if it has one.

    Args:
        config: the run.
        ds_user: the user's DeepSpeed JSON.
        ds_source: where that came from, for messages.
        request: what this process is asked by signals; None: signals are not listened to.
        allowed: keys that may differ from those of the run in the folder, beside the free ones.

    Returns:
        The exit code, the same on every rank: 0, or STOPPED after a stop on request.

    Raises:
        UserError: anything that the user can put right, on every rank.
    """
    started = time.perf_counter()
    device = start_distributed(config.run.timeout_seconds)
    lines = report(device)
    if is_rank0():
        print(lines, flush=True)
    stop = StopVote(request or StopRequest(), Path(config.run.dir), device)
    if stop.requested(now=True):
        return _stopped_at_start(stop)
    with run_folder_lock(Path(config.run.dir)):
        stop.folder_is_ours = True
        return _train(config, ds_user, ds_source, device, stop, started, allowed)


def _train(
    config: RunConfig,
    ds_user: dict[str, Any],
    ds_source: str,
    device: torch.device,
    stop: StopVote,
    started: float,
    allowed: Sequence[str],
) -> int:
    """The run, once its folder is this job's; the exit code."""
    clock = CompileClock()
    config = with_pretrained_sizes(config)
    mesh = make_mesh(config.parallel.tensor, device.type)
    ds_config = resolve_deepspeed_config(config, ds_user, ds_source, mesh.data_size)
    train_data, validation_data = run_on_all(lambda: _open_data(config))
    if config.checkpoint.keep_best and validation_data is None:
        raise AgreedError(
            f"checkpoint.keep_best is {config.checkpoint.keep_best} and there is no validation "
            "data to tell the best by: give data.validation, or set it to 0"
        )
    check_ranks_agree(config, ds_config, train_data.fingerprint)
    changed = run_on_rank0(lambda: check_run_folder(config, allowed))
    found = find_checkpoint(Path(config.run.dir), config.checkpoint.verify)
    if found.tag is None and is_rank0() and has_updates(Path(config.run.dir)):
        print(
            f"note: run.dir {config.run.dir} has updates in its metrics.jsonl but no checkpoint to "
            "go on from: the run begins again",
            flush=True,
        )
    if config.model.from_pretrained is not None and found.tag is None:
        run_on_rank0(lambda: check_pretrained_tokenizer(config, train_data))
    decoder, imported = initial_model(config, device, mesh, resuming=found.tag is not None)
    facts = _facts(config, ds_config, decoder, train_data)
    engine = build_engine(config, ds_config, decoder)
    limit_collectives(config.run.timeout_seconds)
    if stop.requested(now=True):
        return _stopped_at_start(stop)
    restarts, relora = _make_restarts(config, engine, decoder)
    run_on_rank0(lambda: write_run_folder(config, ds_config))
    if imported is not None:
        run_on_rank0(lambda: write_supports(Path(config.run.dir), imported.supports))
    tidy(Path(config.run.dir), found)
    data_may_differ = any(key.startswith("data.") for key, _, _ in changed)
    saved, resumed = _resume(config, engine, found, train_data, data_may_differ)
    start = TrainProgress() if saved is None else TrainProgress.of(saved)
    metrics = run_on_all(lambda: _metrics(config))
    loader = _loader(config, train_data, mesh, start.next_batch, device.type == "cuda")
    watchdog = Watchdog(config.health.stall_seconds, Path(config.run.dir), dist.get_rank())
    with metrics, loader, watchdog:
        seconds = round(time.perf_counter() - started, 3)
        facts |= {"startup_seconds": seconds, "versions": versions(device)}
        metrics.write("start", start.update, **facts)
        if imported is not None:
            metrics.write("import", start.update, **imported.metrics())
        if resumed:
            metrics.write("resume", start.update, **resumed, allowed=[list(c) for c in changed])
        trainer = Trainer(
            config,
            engine,
            device,
            loader,
            _validation(config, validation_data, mesh),
            restarts,
            relora,
            metrics,
            stop,
            watchdog,
            clock,
            {"data_fingerprint": train_data.fingerprint},
            saved,
        )
        trainer.run()
        _write_end(metrics, trainer, restarts, time.perf_counter() - started, stop.reason)
    return 0 if trainer.finished else STOPPED


def _stopped_at_start(stop: StopVote) -> int:
    """End a run that was asked to stop before anything of it was there to save."""
    stop.acknowledge()
    if is_rank0():
        print(f"stopped during start-up ({stop.reason})", flush=True)
    return STOPPED


def _facts(
    config: RunConfig, ds_config: dict[str, Any], decoder: Decoder, data: TokenDataset
) -> dict[str, Any]:
    """What the ``start`` event says of the run; before ZeRO-3 cuts the parameters."""
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


def _make_restarts(
    config: RunConfig, engine: Any, decoder: Decoder
) -> tuple[Restarts, Relora | None]:
    """The run's restarts, and ReLoRA's merges if that is its method."""
    restarts = Restarts(
        config.restarts,
        engine,
        decoder.factor_pairs(),
        config.train.updates,
        make_schedule(config.schedule, config.train.updates),
    )
    if config.method.name != "relora":
        return restarts, None
    layers = [linear for linear in decoder.linears() if isinstance(linear, LoRALinear)]
    return restarts, Relora(config.method, engine, layers, config.run.seed)


def _resume(
    config: RunConfig,
    engine: Any,
    found: Found,
    data: TokenDataset,
    data_may_differ: bool,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Load the checkpoint if there is one; what it says, and what the log says of it."""
    if found.tag is None:
        return None, {}
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
    }
    return state, facts


def _open_data(config: RunConfig) -> tuple[TokenDataset, TokenDataset | None]:
    """Open and check training and validation data on this rank."""
    data = config.data
    train = open_training_data(
        [{"path": s.path, "weight": s.weight} for s in data.train],
        sequence_length=data.sequence_length,
        packing=data.packing,
    )
    if config.model.from_pretrained is None:  # else: check_pretrained_tokenizer
        check_vocabulary(train, sizes_of(config).vocab_size)
    validation = None
    paths = list(data.validation or ())
    if not paths and all(has_validation_split(source.path) for source in data.train):
        paths = [source.path for source in data.train]
    if paths:
        validation = open_validation_data(
            paths, sequence_length=data.sequence_length, packing=data.packing
        )
    if validation is not None:
        check_same_tokenizer(train, validation)
    return train, validation


def _loader(
    config: RunConfig, data: TokenDataset, mesh: Mesh, start_update: int, pin_memory: bool
) -> UpdateLoader:
    return UpdateLoader(
        data,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        seed=config.run.seed,
        start_update=start_update,
        prefetch_updates=config.data.prefetch_updates,
        pin_memory=pin_memory,
    )


def _metrics(config: RunConfig) -> MetricsWriter:
    return MetricsWriter(
        Path(config.run.dir),
        is_rank0(),
        config.train.updates,
        config.log.tensorboard,
        config.log.wandb_project,
        config.model_dump(mode="json"),
    )


def _write_end(
    metrics: MetricsWriter, trainer: Trainer, restarts: Restarts, seconds: float, stop: str | None
) -> None:
    """The last event of this start; ``stop`` is why it stopped, if it did not finish."""
    metrics.write(
        "end",
        trainer.update,
        updates=trainer.update,
        seconds=round(seconds, 3),
        train_seconds=round(trainer.train_seconds, 3),
        skipped=trainer.health.skipped,
        rollbacks=trainer.health.rollbacks,
        restart_share=restarts.seconds / max(trainer.train_seconds, 1e-9),
        reason="finished" if trainer.finished else stop,
    )


def _validation(
    config: RunConfig, data: TokenDataset | None, mesh: Mesh
) -> dict[bool, EvaluationBatches] | None:
    """The batches evaluated on the way (False) and after the last update (True)."""
    if data is None:
        return None
    limits = {last: config.evaluation.limit(last) for last in (False, True)}
    batches = {  # one set where both are the same
        limit: EvaluationBatches(
            data,
            micro_batch_size=config.evaluation.micro_batch_size or config.train.micro_batch_size,
            rank=mesh.data_rank,
            world_size=mesh.data_size,
            max_targets=limit,
        )
        for limit in set(limits.values())
    }
    return {last: batches[limit] for last, limit in limits.items()}
