"""Runs on a worker pool with something wrong in chosen batches, for the tests of health."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megalr.data.loader import UpdateBatch, UpdateLoader
from megalr.engine.skip_step import poison_nonfinite
from megalr.engine.state import EngineState
from megalr.models.decoder import Decoder
from megalr.training import step as update
from megalr.training.hooks import CheckpointHook
from megalr.training.step import StepResult
from megalr.training.trainer import Trainer
from tests.training.runs import run

BAD_RANK = 1
Fingerprints = list[tuple[int, bool, bool]]


class _Now:
    """The batch that is being trained on."""

    number = -1
    micro_batch = 0


def spoil(kind: str, loss: torch.Tensor) -> torch.Tensor:
    """The guarded loss with one thing wrong: its value, its gradient, or its value alone."""
    if kind == "nan_loss":
        return poison_nonfinite(loss * float("nan"))
    if kind == "inf_loss":  # its derivative is finite
        return poison_nonfinite(loss + float("inf"))
    spoilt = poison_nonfinite(loss)
    spoilt.register_hook(lambda gradient: gradient * float("nan"))
    return spoilt.clone()


@contextlib.contextmanager
def bad_batches(bad: dict[int, str], everywhere: bool = False) -> Iterator[None]:
    """Spoil the last micro-batch of the numbered batches, on BAD_RANK only or on all."""

    def ours(loss: torch.Tensor) -> torch.Tensor:
        _Now.micro_batch += 1
        here = everywhere or dist.get_rank() == BAD_RANK
        if here and _Now.number in bad and _Now.micro_batch == 2:
            return spoil(bad[_Now.number], loss)
        return poison_nonfinite(loss)

    with _knowing_the_batch(), patch.object(update, "poison_nonfinite", ours):
        yield


@contextlib.contextmanager
def high_losses(numbers: Sequence[int], factor: float) -> Iterator[None]:
    """Multiply loss and gradient of the numbered batches."""
    plain = Decoder.forward

    def forward(self: Decoder, *arguments: Any) -> torch.Tensor:
        loss = plain(self, *arguments)
        return loss * factor if self.training and _Now.number in numbers else loss

    with _knowing_the_batch(), patch.object(Decoder, "forward", forward):
        yield


@contextlib.contextmanager
def _knowing_the_batch() -> Iterator[None]:
    plain = Trainer.train_update

    def train_update(self: Trainer, batch: UpdateBatch) -> StepResult:
        _Now.number, _Now.micro_batch = batch.update, 0
        try:
            return plain(self, batch)
        finally:
            _Now.number = -1

    with patch.object(Trainer, "train_update", train_update):
        yield


def run_with_bad_batches(
    values: dict[str, Any], ds: dict[str, Any], bad: dict[int, str], everywhere: bool = False
) -> Fingerprints:
    """A run; of every update (its number, whether masters, whether moments changed here)."""
    seen: Fingerprints = []
    plain = Trainer.train_update

    def train_update(self: Trainer, batch: UpdateBatch) -> StepResult:
        state = EngineState(self.run.engine)
        before = _copies(state)
        result = plain(self, batch)
        after = _copies(state)
        changed = [not _equal(old, new) for old, new in zip(before, after, strict=True)]
        seen.append((result.update, changed[0], changed[1]))
        return result

    with patch.object(Trainer, "train_update", train_update), bad_batches(bad, everywhere):
        run(values, ds)
    return seen


def run_and_see_the_engine(
    values: dict[str, Any], ds: dict[str, Any], bad: dict[int, str], may_defer: bool
) -> tuple[list[int], list[int]]:
    """A run; updates checked after the next was launched, the engine's skips at checkpoints.

    ``may_defer`` False: every update is checked and reported before the next is launched.
    """
    late: list[int] = []
    skipped: list[int] = []
    check, save, can_defer = Trainer.check, CheckpointHook.save, Trainer._can_defer

    def checked(self: Trainer, result: StepResult) -> str | None:
        if result.update < self.run.progress.update:
            late.append(result.update)
        return check(self, result)

    def saved(self: CheckpointHook) -> None:
        skipped.append(self.run.engine.skipped_steps)
        save(self)

    def defers(self: Trainer, result: StepResult) -> bool:
        return may_defer and can_defer(self, result)

    with (
        patch.multiple(Trainer, check=checked, _can_defer=defers),
        patch.object(CheckpointHook, "save", saved),
        bad_batches(bad),
    ):
        run(values, ds)
    return late, skipped


def _copies(state: EngineState) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    masters = [state.master(p) for p in state.parameters()]
    moments = [
        value.clone()
        for entry in state.base.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    return [m.clone() for m in masters if m is not None], moments


def _equal(old: list[torch.Tensor], new: list[torch.Tensor]) -> bool:
    return len(old) == len(new) and all(map(torch.equal, old, new))


def run_with_high_losses(
    values: dict[str, Any], ds: dict[str, Any], numbers: Sequence[int], factor: float
) -> None:
    """A run in which some batches have a loss and a gradient that are ``factor`` times too high."""
    with high_losses(numbers, factor):
        run(values, ds)


def run_without_batches(
    values: dict[str, Any], ds: dict[str, Any], first: int, left_out: int
) -> None:
    """The run that has never heard of the ``skipped`` batches from number ``first`` on."""
    plain = UpdateLoader._load

    def load(self: UpdateLoader, number: int) -> UpdateBatch:
        batch = plain(self, number if number < first else number + left_out)
        return UpdateBatch(number, batch.micro_batches, batch.num_targets, batch.samples_by_source)

    with patch.object(UpdateLoader, "_load", load):
        run(values, ds)
