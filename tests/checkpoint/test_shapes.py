"""A run continues on another number of ranks and another ZeRO stage as if nothing had happened."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megalr.config.schema import RunConfig
from megalr.training.pretrain import pretrain
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, losses, run, settings, zero
from tests.training.test_methods import METHODS
from tests.training.test_resume import _cut_back

EVERY = {"checkpoint": {"every": 1, "keep_last": 20}}


def continued(source: Path, target: Path, update: int) -> Path:
    """A copy of a run as it was after ``update`` updates, without its metrics."""
    shutil.copytree(source, target)
    _cut_back(target, update)
    (target / "metrics.jsonl").unlink()
    return target


# (ranks, ZeRO stage) and the update up to which it is used
CHAINS = {
    "fp32": [(2, 1, 3), (1, 2, 5), (2, 0, 6), (2, 3, 8), (1, 0, 10)],
    "bf16": [(2, 1, 5), (2, 2, 10)],
    "paper_bf16": [(2, 1, 5), (1, 0, 7), (2, 2, 10)],
}


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(p, marks=pytest.mark.long) for p in CHAINS if p != "fp32")]
)
def test_a_run_that_changes_shape_again_and_again_agrees_with_the_unbroken_one(
    precision: str, data: Path, tmp_path: Path
) -> None:
    # A reset whose counters restart, before and after changes of shape.
    sections = {**EVERY, "restarts": {"every": 4}, "train": {"precision": precision}}
    # After a reset Adam divides rounding by rounding: with a large step unbroken runs of
    # different shapes differ by 1e-4 themselves.
    sections["optimizer"] = {"lr": 0.001}
    folder = tmp_path / "0"
    values = settings(folder, data, **sections)
    run_distributed(run, 2, values, zero(1))
    unbroken = {e["update"]: e for e in events(folder, "step")}
    chain = CHAINS[precision]
    seen = {}
    for number, ((_, _, update), (ranks, stage, _)) in enumerate(pairwise(chain)):
        folder = continued(folder, tmp_path / str(number + 1), update)
        run_distributed(run, ranks, settings(folder, data, **sections), zero(stage))
        (resumed,) = events(folder, "resume")
        assert resumed["update"] == update
        assert resumed["reshaped"]["zero_stage"] == [chain[number][1], stage]
        for step in events(folder, "step"):
            seen[step["update"]] = step
            assert step["tokens"] == unbroken[step["update"]]["tokens"]
            assert step["samples_by_source"] == unbroken[step["update"]]["samples_by_source"]
    close = 1e-5 if precision == "fp32" else 2e-2
    for update, step in seen.items():
        assert step["loss"] == pytest.approx(unbroken[update]["loss"], abs=close)
        assert step["learning_rate"] == unbroken[update]["learning_rate"]


SHAPES = {
    "sltrain": ((3, 2), (2, 3)),
    "lora": ((2, 3), (1, 0)),
    "mixed_ranks": ((2, 3), (3, 1)),
    "galore": ((3, 1), (2, 2)),
    "apollo": ((2, 1), (1, 0)),
    "loro": ((2, 2), (3, 1)),
    "spam": ((3, 3), (2, 1)),
    "spam_masked": ((3, 2), (1, 0)),
    "stable_spam": ((2, 3), (1, 0)),
    "fira": ((2, 1), (3, 2)),
    "golore": ((3, 2), (1, 0)),
    "apollo_mini": ((1, 0), (2, 2)),
    "muon": ((2, 2), (1, 1)),
    "normuon": ((3, 1), (2, 3)),
    "scale": ((2, 3), (3, 1)),
    "spectron": ((3, 2), (2, 3)),
    "cola": ((2, 3), (3, 1)),
    "ratios": ((3, 2), (1, 0)),
    "galore_ratios": ((2, 3), (2, 1)),
}
LIKE_OTHERS = (
    "mixed_ranks",
    "fira",
    "golore",
    "apollo_mini",
    "muon",
    "normuon",
    "spectron",
    "cola",
)
"""In make test-all only."""
BY_KIND = {
    "lr_ratio": {"embedding": 3.0, "head": 0.5, "norms": 2.0},
    "weight_decay": 0.1,
    "weight_decay_ratio": {"head": 0.0},
}
FURTHER = {
    "spam_masked": {"optimizer": {**METHODS["spam"]["optimizer"], "density": 0.5}},
    "ratios": {"optimizer": BY_KIND},
    "galore_ratios": {**METHODS["galore"], "optimizer": BY_KIND},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LIKE_OTHERS else n for n in SHAPES]
)
def test_every_kind_of_optimizer_state_survives_a_change_of_shape(
    name: str, data: Path, tmp_path: Path
) -> None:
    sections = {**(METHODS | FURTHER)[name], **EVERY, "train": {"updates": 8}}
    sections["evaluation"] = {"every": 0}
    (ranks, stage), (other_ranks, other_stage) = SHAPES[name]
    folder = tmp_path / "saved"
    run_distributed(run, ranks, settings(folder, data, **sections), zero(stage))
    unbroken = losses(folder)
    again = continued(folder, tmp_path / "continued", 5)
    run_distributed(run, other_ranks, settings(again, data, **sections), zero(other_stage))
    assert losses(again) == pytest.approx(unbroken[5:], abs=1e-5)


# (tensor-parallel size, its layout, data-parallel size, ZeRO stage), update up to which it is used
GRIDS = {
    "low_rank": [
        (2, "bottleneck", 1, 1, 2),
        (1, "auto", 2, 1, 4),
        (2, "column_row", 2, 1, 6),
        (1, "auto", 1, 0, 8),
    ],
    "sltrain": [(1, "auto", 2, 2, 3), (2, "column_row", 1, 0, 5), (1, "auto", 1, 1, 8)],
}


@pytest.mark.long
@pytest.mark.parametrize("method", GRIDS)
def test_a_run_changes_its_tensor_parallel_size_and_agrees_with_the_unbroken_one(
    method: str, data: Path, tmp_path: Path
) -> None:
    sections = {**EVERY, "train": {"updates": 8}, "optimizer": {"lr": 0.003}}
    if method == "sltrain":
        sections |= METHODS["sltrain"]
    unbroken = tmp_path / "unbroken"
    run_distributed(run, 1, settings(unbroken, data, **sections), zero(0))
    expected = losses(unbroken)
    folder, done = tmp_path / "0", 0
    for number, (tensor, layout, ranks, stage, update) in enumerate(GRIDS[method]):
        if number:
            folder = continued(folder, tmp_path / str(number), done)
        parallel = {"tensor": tensor, "layout": layout}
        values = settings(folder, data, **sections, parallel=parallel)
        run_distributed(run, tensor * ranks, values, zero(stage))
        assert losses(folder) == pytest.approx(expected[done:], abs=1e-5)
        done = update


@pytest.mark.long
def test_a_tensor_parallel_run_resumes_bitwise(data: Path, tmp_path: Path) -> None:
    sections = {**EVERY, "restarts": {"every": 4}, "train": {"precision": "bf16"}}
    sections["parallel"] = {"tensor": 2}
    source = tmp_path / "source"
    run_distributed(run, 2, settings(source, data, **sections), zero(1))
    again = continued(source, tmp_path / "again", 7)
    run_distributed(run, 2, settings(again, data, **sections), zero(1))
    assert events(again, "resume")[0]["reshaped"] == {}
    for kind, keys in (("step", ("loss", "gradient_norm")), ("eval", ("loss",))):
        expected = {e["update"]: [e[key] for key in keys] for e in events(source, kind)}
        for event in events(again, kind):
            assert [event[key] for key in keys] == expected[event["update"]]


def _with_other_scope(values: dict[str, Any], ds_user: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    pretrain(config, ds_user, "test.json", allowed=("restarts.reset_scope",))


@pytest.mark.parametrize("stage", [1, *(pytest.param(s, marks=pytest.mark.long) for s in (0, 3))])
def test_groups_of_parameters_may_change_with_what_divides_them(
    stage: int, data: Path, tmp_path: Path
) -> None:
    """Up to the first reset both scopes train alike; the groups differ from the start."""
    sections = {**EVERY, "train": {"updates": 6}, "optimizer": {"lr": 0.001}}
    sections["method"] = {"name": "full_rank"}
    layers = {"restarts": {"reset_every": 4, "reset_scope": "layers"}}
    values = settings(tmp_path / "layers", data, **sections, **layers)
    run_distributed(run, 2, values, zero(stage))
    run_distributed(
        run,
        2,
        settings(tmp_path / "all", data, **sections, restarts={"reset_every": 4}),
        zero(stage),
    )
    folder = continued(tmp_path / "all", tmp_path / "changed", 3)
    values = settings(folder, data, **sections, **layers)
    run_distributed(_with_other_scope, 2, values, zero(stage))
    (resumed,) = events(folder, "resume")
    assert "groups" in resumed["reshaped"] and "zero_stage" not in resumed["reshaped"]
    assert losses(folder) == pytest.approx(losses(tmp_path / "layers")[3:], abs=1e-6)
    assert losses(folder)[-1] != pytest.approx(losses(tmp_path / "all")[-1], abs=1e-5)
    # After the reset embedding and head have their own counters, for which one group has no room.
    folder = continued(tmp_path / "layers", tmp_path / "merged", 5)
    values = settings(folder, data, **sections, restarts={"reset_every": 4})
    if stage:
        with pytest.raises(RankFailed, match="differ in the checkpoint, and here one serves both"):
            run_distributed(_with_other_scope, 2, values, zero(stage))
