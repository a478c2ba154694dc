"""A run that starts from another run's checkpoint is that run from there on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megalr.checkpoint import open_checkpoint
from megalr.config.schema import RunConfig
from megalr.report.marks import marks_of
from megalr.run.metrics_reader import read_run
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, run, settings, zero
from tests.training.test_resume import _cut_back

KEPT = {"checkpoint": {"every": 1, "keep_last": 20}}
COMPARED = ("update", "loss", "gradient_norm", "learning_rate", "tokens", "samples_by_source")


def _wsd(decay: int) -> dict[str, Any]:
    return {"name": "wsd", "warmup_updates": 3, "decay_updates": decay, "min_lr_ratio": 0.1}


def _steps(folder: Path, after: int = 0) -> list[dict[str, Any]]:
    found = [event for event in events(folder, "step") if event["update"] > after]
    return [{key: event[key] for key in COMPARED} for event in found]


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _masters(folder: Path, tag: str) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder, tag)
    return {name: checkpoint.parameter(name) for name in checkpoint.names()}


@pytest.mark.parametrize(
    "stage, precision",
    [
        (0, "fp32"),
        pytest.param(1, "bf16", marks=pytest.mark.long),
        pytest.param(0, "paper_bf16", marks=pytest.mark.long),
        pytest.param(3, "bf16", marks=pytest.mark.long),
    ],
)
def test_a_decay_branch_of_a_stable_run_is_bitwise_the_run_that_was_planned_so(
    stage: int, precision: str, data: Path, tmp_path: Path
) -> None:
    sections = {"train": {"precision": precision}, "restarts": {"every": 4}}
    sections["checkpoint"] = {"every": 1, "keep_last": 6}
    stable = tmp_path / "stable"
    values = settings(stable, data, **sections, schedule=_wsd(0))
    run_distributed(run, 2, values, zero(stage))
    before = _contents(stable)
    sections["train"] = {"precision": precision, "updates": 8}
    planned = settings(tmp_path / "planned", data, **sections, schedule=_wsd(3))
    run_distributed(run, 2, planned, zero(stage))

    branch = tmp_path / "branch"
    origin = {"run": {"fork_from": f"{stable}@5"}}
    values = settings(branch, data, **sections, **origin, schedule=_wsd(3))
    run_distributed(run, 2, values, zero(stage))
    assert _steps(branch) == _steps(tmp_path / "planned", after=5)
    rates = [step["learning_rate"] for step in _steps(branch)]
    assert rates == pytest.approx([0.01, 0.01 * (0.1 + 0.9 * (1 - 3**-0.5)), rates[2]])
    assert rates[2] == pytest.approx(0.01 * (0.1 + 0.9 * (1 - (2 / 3) ** 0.5)))
    assert events(branch, "eval")[-1]["loss"] == events(tmp_path / "planned", "eval")[-1]["loss"]
    assert _contents(stable) == before
    assert events(branch, "start")[0]["update"] == 5
    (forked,) = events(branch, "fork")
    assert forked["update"] == forked["source_update"] == 5 and forked["state"] == "all"
    assert forked["path"] == f"{stable}/checkpoints/update_5" and forked["reshaped"] == {}
    assert forked["changed"] == [["schedule.decay_updates", 0, 3], ["train.updates", 10, 8]]
    (mark,) = [mark for mark in marks_of(read_run(branch)) if mark.kind == "fork"]
    assert mark.update == 5 and "state: all" in mark.details

    # It has a checkpoint of its own at once, and resumes from those without its source.
    shutil.rmtree(stable)
    for update in (5, 7):
        _cut_back(branch, update)
        (branch / "metrics.jsonl").unlink()
        run_distributed(run, 2, values, zero(stage))
        assert [event["update"] for event in events(branch, "resume")] == [update]
        assert not events(branch, "fork")
        assert _steps(branch) == _steps(tmp_path / "planned", after=update)


def test_a_fork_on_other_ranks_agrees_with_the_source(data: Path, tmp_path: Path) -> None:
    sections = {**KEPT, "optimizer": {"lr": 0.001}}
    source = tmp_path / "source"
    run_distributed(run, 2, settings(source, data, **sections), zero(2))
    origin = {"fork_from": f"{source}@update_6"}
    values = settings(tmp_path / "fork", data, **sections, run=origin)
    run_distributed(run, 1, values, zero(0))
    (forked,) = events(tmp_path / "fork", "fork")
    assert forked["reshaped"]["zero_stage"] == [2, 0] and forked["changed"] == []
    for ours, theirs in zip(_steps(tmp_path / "fork"), _steps(source, after=6), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize(
    "ranks, stage, precision",
    [
        (1, 0, "fp32"),
        pytest.param(2, 1, "bf16", marks=pytest.mark.long),
        pytest.param(2, 2, "bf16", marks=pytest.mark.long),
        pytest.param(2, 3, "bf16", marks=pytest.mark.long),
    ],
)
def test_weights_alone_start_a_run_at_update_0_with_a_new_optimizer(
    ranks: int, stage: int, precision: str, data: Path, tmp_path: Path
) -> None:
    source, fork = tmp_path / "source", tmp_path / "fork"
    method = {"name": "lora", "rank": 4}  # with frozen weights too
    run_distributed(run, 2, settings(source, data, method=method), zero(1))
    origin = {"fork_from": str(source), "fork_state": "weights"}
    sections = {**KEPT, "optimizer": {"name": "stable_spam", "lr": 0.002}}
    sections |= {"train": {"updates": 4, "precision": precision}, "method": method}
    values = settings(fork, data, run=origin, **sections)
    run_distributed(run, ranks, values, zero(stage))
    (forked,) = events(fork, "fork")
    assert (forked["update"], forked["source_update"], forked["state"]) == (0, 10, "weights")
    assert ["optimizer.name", "adamw", "stable_spam"] in forked["changed"]
    ours, theirs = _masters(fork, "update_0"), _masters(source, "update_10")
    assert ours.keys() == theirs.keys()
    trained = open_checkpoint(source).source.trained
    for name, weight in ours.items():
        dtype = torch.float32 if trained(name) or precision == "fp32" else torch.bfloat16
        assert torch.equal(weight, theirs[name].to(dtype).float()), name
    steps = _steps(fork)
    scratch = settings(tmp_path / "scratch", data, **sections)
    run_distributed(run, ranks, scratch, zero(stage))
    for ours, theirs in zip(steps, _steps(tmp_path / "scratch"), strict=True):
        different = ("loss", "gradient_norm")  # the same data, from the start, at the same rates
        assert all(ours[key] == theirs[key] for key in COMPARED if key not in different)
        assert ours["loss"] < theirs["loss"] - 0.3  # the source has learned
    for update in (0, 2):
        _cut_back(fork, update)
        (fork / "metrics.jsonl").unlink()
        run_distributed(run, ranks, values, zero(stage))
        assert events(fork, "resume")[0]["update"] == update
        assert _steps(fork) == [step for step in steps if step["update"] > update]


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    values = settings(folder, data, train={"updates": 4}, checkpoint={"every": 2})
    run_distributed(run, 1, values, zero(1))
    return folder


@pytest.mark.parametrize(
    "suffix, sections, message",
    [
        ("@3", {}, "there is no checkpoint update_3, but update_2, update_4"),
        ("x", {}, "holds no checkpoint: give the folder of a run, or FOLDER@UPDATE"),
        ("", {"model": {"hidden_size": 64}}, "another model, .*model.hidden_size: 48 there, 64"),
        ("", {"model": {"rope_theta": 5e5}}, r"model.rope_theta: 10000.0 there, 500000.0 here"),
        (
            "",
            {"method": {"rank": 4}},
            "method.rank: 8 there, 4 here.*the same values, or .* with megalr ranks$",
        ),
        ("", {"train": {"precision": "bf16"}}, "train.precision: fp32 .*fork_state=weights"),
        ("", {"optimizer": {"name": "muon"}}, "optimizer.name: adamw .*fork_state=weights"),
        ("@4", {"train": {"updates": 4}}, "is at update 4, and train.updates = 4 leaves none to"),
    ],
)
def test_a_fork_that_cannot_be_is_one_line_and_claims_no_folder(
    suffix: str, sections: dict[str, Any], message: str, source: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fork"
    values = settings(folder, data, **sections, run={"fork_from": f"{source}{suffix}"})
    with pytest.raises(RankFailed, match=rf"AgreedError: .*run\.fork_from = .*{message}"):
        run_distributed(run, 1, values, zero(1))
    assert not folder.exists()


def test_a_damaged_source_is_named_and_no_older_one_is_taken(
    source: Path, data: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    file = next((damaged / "checkpoints" / "update_4").glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    values = settings(tmp_path / "fork", data, run={"fork_from": str(damaged)})
    with pytest.raises(RankFailed, match=r"update_4 is damaged .*another checksum .*@UPDATE"):
        run_distributed(run, 2, values, zero(1))
    values["run"]["fork_from"] += "@2"
    run_distributed(run, 2, values, zero(1))
    assert events(tmp_path / "fork", "fork")[0]["update"] == 2


def test_a_run_is_no_fork_of_itself(data: Path, tmp_path: Path) -> None:
    values = settings(tmp_path / "a", data, run={"fork_from": f"{tmp_path}/b/../a@7"})
    with pytest.raises(ValueError, match=re.escape("run.fork_from: is run.dir itself")):
        RunConfig.model_validate(values)


def test_sparse_entries_stay_where_they_are(data: Path, tmp_path: Path) -> None:
    method = {"name": "sltrain", "rank": 4, "density": 0.05}
    sections = {"method": method, "train": {"updates": 3}}
    run_distributed(run, 1, settings(tmp_path / "source", data, **sections), zero(1))
    origin = {"fork_from": str(tmp_path / "source"), "fork_state": "weights"}
    other = settings(tmp_path / "fork", data, **sections, run={**origin, "seed": 1})
    with pytest.raises(RankFailed, match=r"run\.seed: 42 there, 1 here"):
        run_distributed(run, 1, other, zero(1))
    run_distributed(run, 1, settings(tmp_path / "fork", data, **sections, run=origin), zero(1))
    assert events(tmp_path / "fork", "fork")[0]["state"] == "weights"
