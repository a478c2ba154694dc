"""Whole runs with restarts: against plain PyTorch, and interrupted against uninterrupted."""

from __future__ import annotations

import pytest
import torch

from megalr.config.restarts import RestartsConfig
from megalr.restarts.controller import Restarts
from tests.ranks import run_distributed
from tests.restarts.engines import (
    KINDS,
    batch,
    engine_of,
    make_decoder,
    make_optimizer,
    on_ranks,
    train,
)

UPDATES = 22
LEARNING_RATE = 2e-3


def _reference(after: tuple[int, ...] = (5, 10, 15)) -> list[float]:
    """The same run in plain PyTorch, one process: SVD of the materialised product, new moments."""
    decoder = make_decoder()
    optimizer = make_optimizer(decoder, LEARNING_RATE)
    losses = []
    for update in range(UPDATES):
        ids, labels = batch(update)
        loss = decoder(ids, labels) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if update + 1 in after:
            for pair in decoder.factor_pairs():
                b = pair.b.data[slice(*pair.b_rows)]
                a = pair.a.data[slice(*pair.a_rows)]
                u, s, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
                r = pair.rank
                b.copy_(u[:, :r] * s[:r].sqrt())
                a.copy_(s[:r].sqrt()[:, None] * vt[:r])
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()  # moments and step
    return losses


def _restarted(kind: str) -> tuple[list[float], list[int]]:
    config = RestartsConfig(every=5, stop_before=5, verify=True)
    with engine_of(kind) as engine:
        restarts = Restarts(config, engine, engine.module.factor_pairs(), 20, lambda t: 1.0)
        losses, happened = [], []
        for update in range(UPDATES):
            losses.append(train(engine, update))
            report = restarts.after_update(update + 1)
            if report is not None:
                assert report.refactorized and report.reset and report.verified
                assert report.fraction_reset == 1.0 and report.matrices == 14
                happened.append(report.update)
        return losses, happened


@pytest.mark.parametrize(
    ("world_size", "kind"),
    on_ranks(
        [kind for kind in KINDS if kind.startswith("fp32")],
        ["fp32 stage 0", "fp32 stage 2", "fp32 stage 3"],
    ),
)
def test_losses_equal_a_plain_pytorch_run_with_full_svd(world_size: int, kind: str) -> None:
    expected = _reference()
    assert len(set(expected)) == UPDATES
    for losses, happened in run_distributed(_restarted, world_size, kind):
        assert happened == [5, 10, 15]
        assert losses == pytest.approx(expected, rel=1e-5)


def test_leaving_out_one_restart_would_be_noticed() -> None:
    expected, other = _reference(), _reference(after=(10, 15))
    assert other[:5] == expected[:5]
    # The sixth loss is that of the same function, with factors rounded to float32 once more.
    assert other[5] == pytest.approx(expected[5], rel=1e-6)
    difference = max(abs(a / b - 1) for a, b in zip(other[6:10], expected[6:10], strict=True))
    assert difference > 1e-3


CONFIG = {
    "every": 4,
    "lr_recovery": "linear",
    "recovery_updates": 3,
    "gradient_norm_spike": 1.01,  # so low that it triggers: its memory must be resumed too
    "spike_window": 4,
}


def _run(engine, restarts: Restarts, first: int, last: int, folder: str | None) -> list:
    """Updates first .. last - 1; checkpoints just before, at and just after the restart at 4."""
    events = []
    for update in range(first, last):
        for group in engine.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * restarts.learning_rate_factor(update)
        loss = train(engine, update)
        norm = engine.get_global_grad_norm()
        # Plain fp32 at stage 0 keeps no norm; any uneven function of the run will do.
        norm = loss * (1 + update % 3) if norm is None else float(norm)
        report = restarts.after_update(update + 1, norm)
        events.append((update, loss, report.trigger if report else None))
        if folder is not None and update + 1 in (3, 4, 5):
            engine.save_checkpoint(
                folder, tag=f"u{update + 1}", client_state={"restarts": restarts.state_dict()}
            )
    return events


def _interrupted(kind: str, folder: str) -> list:
    config = RestartsConfig(**CONFIG)
    total = 10

    def make(engine) -> Restarts:
        # The run is longer than the updates made here: restarts at its last one are deferred.
        pairs = engine.module.factor_pairs()
        return Restarts(config, engine, pairs, total + 1, lambda t: 1 / (1 + t))

    with engine_of(kind) as engine:
        restarts = make(engine)
        whole = _run(engine, restarts, 0, total, folder)
        # Back in the same process, as a rollback does.
        _, client = engine.load_checkpoint(folder, tag="u4")
        restarts.load_state_dict(client["restarts"])
        restarts.after_load()
        assert _run(engine, restarts, 4, total, None) == whole[4:]
    for start in (3, 4, 5):
        with engine_of(kind) as engine:
            restarts = make(engine)
            _, client = engine.load_checkpoint(folder, tag=f"u{start}")
            restarts.load_state_dict(client["restarts"])
            assert _run(engine, restarts, start, total, None) == whole[start:], start
    return whole


@pytest.mark.parametrize(
    "kind",
    [
        "fp32 stage 0",
        "fp32 stage 2",
        "fp32 stage 3",
        "bf16 stage 0",
        "bf16 stage 1",
        "bf16 stage 2",
        "bf16 stage 2 offload",
        "bf16 stage 3",
        "paper_bf16 stage 0",
        "paper_bf16 stage 1",
    ],
)
def test_resuming_around_a_restart_repeats_the_uninterrupted_run_bitwise(
    kind: str, tmp_path
) -> None:
    first, second = run_distributed(_interrupted, 2, kind, str(tmp_path))
    assert first == second
    assert [update for update, _, trigger in first if trigger == "period"] == [3, 7]
    assert any(trigger == "gradient_norm" for _, _, trigger in first)
