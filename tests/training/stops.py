"""Points of a run at which a rank gets a signal, for the tests of stopping."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megalr.config import loading
from megalr.config.schema import RunConfig
from megalr.data.loader import MicroBatch, UpdateBatch
from megalr.distributed import watchdog
from megalr.distributed.signals import STOP_SIGNALS, StopRequest
from megalr.training import hooks, pretrain
from megalr.training import trainer as loop
from megalr.training.hooks import EvaluationHook
from megalr.training.step import StepResult, train_step
from megalr.training.trainer import Trainer


def run_until_signal(
    values: dict[str, Any], ds: dict[str, Any], point: str, rank: int, number: int, update: int = 0
) -> int:
    """Exit code of a run in which one rank gets signal ``number`` (0: makes a stop file).

    ``point``: start, step, evaluation, saving, or never; from ``update`` on.
    """

    def act(update_now: int) -> None:
        if dist.get_rank() != rank or update_now < update:
            return
        if number:
            os.kill(os.getpid(), number)
        else:
            Path(values["run"]["dir"], "stop").touch()

    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    try:
        with _at(point, act):
            config = RunConfig.model_validate(values)
            return pretrain.pretrain(config, ds, "test.json", StopRequest().listen())
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@contextlib.contextmanager
def _at(point: str, act: Any) -> Iterator[None]:
    """Call ``act(updates done or being made)`` whenever the run comes to ``point``."""
    build_engine, save_checkpoint = pretrain.build_engine, hooks.save_checkpoint
    until_stopped = EvaluationHook._until_stopped

    def start(*arguments: Any) -> Any:
        act(0)
        return build_engine(*arguments)

    def in_step(engine: Any, batch: UpdateBatch, update: int, *rest: Any) -> StepResult:
        act(update)
        return train_step(engine, batch, update, *rest)

    def in_evaluation(self: EvaluationHook, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        for seen, batch in enumerate(until_stopped(self, batches)):
            if seen == 1:
                act(self.run.progress.update)
            yield batch

    def in_saving(engine: Any, config: Any, update: int, *rest: Any) -> Any:
        act(update)
        return save_checkpoint(engine, config, update, *rest)

    patches = {
        "start": (pretrain, "build_engine", start),
        "step": (loop, "train_step", in_step),
        "evaluation": (EvaluationHook, "_until_stopped", in_evaluation),
        "saving": (hooks, "save_checkpoint", in_saving),
    }
    with contextlib.ExitStack() as stack:
        if point != "never":
            where, name, function = patches[point]
            stack.enter_context(patch.object(where, name, function))
        yield


def signal_at_first_sight(rank: int) -> None:
    """Hook: rank 1 gets SIGTERM while it reads its configuration, before there is a world."""
    plain = loading.load_run_config

    def load(*arguments: Any, **options: Any) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **options)

    loading.load_run_config = load


def hang_in_update_3(rank: int) -> None:
    """Hook: rank 1 never comes back from its third update."""
    watchdog.PEER_SECONDS = 1.0
    plain = Trainer.train_update

    def train_update(self: Trainer, batch: UpdateBatch) -> StepResult:
        if rank == 1 and self.run.progress.update == 2:
            hang()
        return plain(self, batch)

    Trainer.train_update = train_update  # type: ignore[method-assign]


def hang() -> None:
    """Stand still."""
    while True:
        time.sleep(0.1)
        torch.zeros(1)
