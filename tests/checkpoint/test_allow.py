"""Which keys may change when a run is resumed, and that the change takes effect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megalr.config.resuming import check_allowed
from megalr.config.schema import RunConfig
from megalr.errors import UserError
from tests.checkpoint.test_shapes import continued
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, losses, run, settings, zero


def _run_allowed(values: dict[str, Any], stage: int, allowed: list[str]) -> None:
    from megalr.training.pretrain import pretrain

    pretrain(RunConfig.model_validate(values), zero(stage), "test.json", None, allowed)


@pytest.mark.parametrize(
    "key, message",
    [
        ("train.update", "unknown key; did you mean train.updates?"),
        ("nonsense", "unknown key"),
        ("model.hidden_size", "model.* cannot change in a run: the weights in the checkpoint are"),
        ("model.*", "cannot change in a run"),
        ("method.rank", "the weights or optimizer states in the checkpoint have that size"),
        ("train.precision", "have that dtype"),
        ("*", "cannot change in a run"),
    ],
)
def test_allowing_what_does_not_exist_or_cannot_work_is_an_error(key: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_allowed(["train.updates", key])


@pytest.mark.long
def test_allowed_keys_change_and_are_logged(data: Path, tmp_path: Path) -> None:
    check_allowed(["optimizer.betas", "optimizer.weight_decay", "schedule.*"])
    source = tmp_path / "source"
    every = {"checkpoint": {"every": 5, "keep_last": 9}}
    run_distributed(run, 2, settings(source, data, **every), zero(1))
    changed = {"betas": (0.5, 0.9), "weight_decay": 0.0}
    found = []
    for number, (ranks, stage) in enumerate(((2, 1), (1, 0))):  # same shape, other shape
        folder = continued(source, tmp_path / str(number), 5)
        values = settings(folder, data, **every, optimizer={"lr": 0.001, **changed})
        allowed = ["optimizer.betas", "optimizer.weight_decay"]
        with pytest.raises(RankFailed, match=r"optimizer.lr: 0.01 there, 0.001 here") as failure:
            run_distributed(_run_allowed, ranks, values, stage, allowed)
        assert "optimizer.betas:" not in str(failure.value)
        run_distributed(_run_allowed, ranks, values, stage, [*allowed, "optimizer.lr"])
        (resumed,) = events(folder, "resume")
        assert resumed["allowed"] == [
            ["optimizer.lr", 0.01, 0.001],
            ["optimizer.betas", [0.9, 0.999], [0.5, 0.9]],
            ["optimizer.weight_decay", 0.1, 0.0],
        ]
        found.append(losses(folder))
    # The loaded optimizer's options would differ between the two ways of loading.
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] != pytest.approx(losses(source)[5:], abs=1e-3)
