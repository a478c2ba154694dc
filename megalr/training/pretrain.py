"""One pretraining run, composed: configuration, data, model, engine, hooks, trainer."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalr.checkpoint.find import tidy
from megalr.checkpoint.source import EXTENSIONS
from megalr.config.methods import ReloraMethod
from megalr.config.schema import RunConfig
from megalr.data import EvaluationBatches, TokenDataset
from megalr.data.build import make_loader, open_data, validation_batches
from megalr.distributed.agreement import is_rank0, raise_on_any_rank, run_on_all, run_on_rank0
from megalr.distributed.process_group import limit_collectives, start_distributed
from megalr.distributed.signals import STOPPED, StopRequest
from megalr.distributed.stop_vote import StopVote
from megalr.distributed.watchdog import Watchdog
from megalr.engine.build import build_engine, described_groups
from megalr.engine.config import resolve_deepspeed_config
from megalr.hf.init_from_pretrained import (
    check_pretrained_tokenizer,
    initial_model,
    read_supports,
    with_pretrained_sizes,
    write_supports,
)
from megalr.layers.lora import LoRALinear
from megalr.models.build import sizes_of
from megalr.models.decoder import Decoder
from megalr.restarts.controller import Restarts
from megalr.restarts.relora import Relora
from megalr.run.environment import check_ranks_agree, report, slow_precision, versions
from megalr.run.folder import write_run_folder
from megalr.run.lock import run_folder_lock
from megalr.run.metrics_writer import MetricsWriter
from megalr.run.origin import Origin, find_origin, resume_from
from megalr.run.terminal import fitted
from megalr.tensor_parallel.mesh import make_mesh
from megalr.training.context import RunContext, TrainProgress
from megalr.training.device import CompileClock
from megalr.training.events import start_facts, write_end, write_start
from megalr.training.hooks import (
    CheckpointHook,
    EvaluationHook,
    Hook,
    LogHook,
    ReloraHook,
    RestartsHook,
)
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
        request: stop signals of this process; None: it does not listen to signals.
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
        print(*(fitted(line, sys.stdout) for line in lines.splitlines()), sep="\n", flush=True)
        if warning := slow_precision(device, config.train.precision):
            print(warning, file=sys.stderr, flush=True)
    stop = StopVote(request or StopRequest(), Path(config.run.dir), device)
    if stop.requested(now=True):
        return _stopped_at_start(stop)
    with run_folder_lock(Path(config.run.dir)):
        stop.folder_is_ours = True
        return _pretrain(config, ds_user, ds_source, device, stop, started, allowed)


def _pretrain(
    config: RunConfig,
    ds_user: dict[str, Any],
    ds_source: str,
    device: torch.device,
    stop: StopVote,
    started: float,
    allowed: Sequence[str],
) -> int:
    """The run, once its folder is locked for this job; the exit code."""
    clock = CompileClock()
    folder = Path(config.run.dir)
    config = with_pretrained_sizes(config)
    mesh = make_mesh(config.parallel.tensor, device.type)
    ds_config = resolve_deepspeed_config(config, ds_user, ds_source, mesh.data_size)
    imports = config.model.from_pretrained is not None
    # check_pretrained_tokenizer compares more than the size of the vocabulary.
    vocab_size = None if imports else run_on_all(lambda: sizes_of(config).vocab_size)
    train_data, validation_data = open_data(config, vocab_size)
    check_ranks_agree(config, ds_config, train_data.fingerprint)
    origin = find_origin(config, allowed)
    fork = origin.fork
    if imports and origin.found.tag is None:
        run_on_rank0(lambda: check_pretrained_tokenizer(config, train_data))
    shared_out = ds_config["zero_optimization"]["stage"] == 3
    decoder, imported, fill = initial_model(config, device, mesh, origin.folder, shared_out)
    facts = start_facts(config, ds_config, decoder, train_data)
    engine = build_engine(config, ds_config, decoder, fill)
    limit_collectives(config.run.timeout_seconds)
    if stop.requested(now=True):
        return _stopped_at_start(stop)
    restarts, relora = _restarts(origin, config, engine, decoder), _relora(config, engine, decoder)
    run_on_rank0(lambda: write_run_folder(config, ds_config))
    tidy(folder, origin.found)
    saved, loaded = resume_from(origin, config, engine, train_data)
    if imported is not None:
        run_on_rank0(lambda: write_supports(folder, imported.supports))
    elif fork is not None:
        run_on_rank0(lambda: write_supports(folder, read_supports(config, fork.run)))
    start = TrainProgress() if saved is None else TrainProgress.of(saved)
    metrics = run_on_all(lambda: _metrics(config, stop.request))
    loader = make_loader(config, train_data, mesh, start.next_batch, device.type == "cuda")
    watchdog = Watchdog(config.health.stall_seconds, folder, dist.get_rank())
    with metrics, loader, watchdog:
        facts["startup_seconds"] = round(time.perf_counter() - started, 3)
        facts |= {
            "versions": versions(device),
            "parameter_groups": described_groups(engine, config),
        }
        write_start(metrics, start.update, facts, imported, origin, loaded)
        compile_clock = clock if config.train.compile else None
        shared = (config, engine, decoder, device, metrics, stop, watchdog, compile_clock, start)
        run = RunContext(*shared)
        log = LogHook(run, run_on_all(lambda: _visible(config, decoder, train_data)))
        batches = {
            name: validation_batches(config, data, mesh) for name, data in validation_data.items()
        }
        identity = {"data_fingerprint": train_data.fingerprint, EXTENSIONS: origin.plan.history}
        hooks = _hooks(run, relora, restarts, log, batches, identity, fork is not None)
        trainer = Trainer(run, loader, restarts.learning_rate_factor, hooks)
        if saved is not None:
            trainer.resume(saved)
        trainer.train()
        seconds = time.perf_counter() - started
        write_end(run, seconds, log.train_seconds, restarts.seconds, trainer.finished)
        raise_on_any_rank(stop.request.error)
    return 0 if trainer.finished else STOPPED


def _stopped_at_start(stop: StopVote) -> int:
    """End a run that was asked to stop before there was anything to save."""
    stop.acknowledge()
    if is_rank0():
        print(f"stopped during start-up ({stop.reason})", flush=True)
    return STOPPED


def _restarts(origin: Origin, config: RunConfig, engine: Any, decoder: Decoder) -> Restarts:
    pairs = decoder.factor_pairs()
    return Restarts(config.restarts, engine, pairs, config.train.updates, origin.plan.factor)


def _relora(config: RunConfig, engine: Any, decoder: Decoder) -> Relora | None:
    """The merges of ReLoRA; None for other methods."""
    if not isinstance(config.method, ReloraMethod):
        return None
    layers = [linear for linear in decoder.linears() if isinstance(linear, LoRALinear)]
    return Relora(config.method, engine, layers, config.run.seed)


def _hooks(
    run: RunContext,
    relora: Relora | None,
    restarts: Restarts,
    log: LogHook,
    validation: dict[str, dict[bool, EvaluationBatches]],
    identity: dict[str, Any],
    forked: bool,
) -> list[Hook]:
    """What is done after some updates, in its order."""
    evaluation = EvaluationHook(run, validation)
    hooks: list[Hook] = [] if relora is None else [ReloraHook(run, relora)]
    hooks += [RestartsHook(run, restarts), log, evaluation]
    return [*hooks, CheckpointHook(run, evaluation, hooks, identity, forked)]


def _visible(config: RunConfig, decoder: Decoder, data: TokenDataset) -> float | None:
    """Positions that a position sees on average; None: as many as causal masking leaves."""
    if not config.data.document_mask:
        return None
    sizes = decoder.config
    windows = Counter(map(sizes.window, range(sizes.num_layers)))
    seen = {window: data.mean_visible(config.run.seed, window) for window in windows}
    return sum(seen[window] * count for window, count in windows.items()) / sizes.num_layers


def _metrics(config: RunConfig, request: StopRequest) -> MetricsWriter:
    return MetricsWriter(
        Path(config.run.dir),
        is_rank0(),
        config.train.updates,
        config.log.tensorboard,
        config.log.wandb_project,
        config.model_dump(mode="json"),
        request.fail,
    )
