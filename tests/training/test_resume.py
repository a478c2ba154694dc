"""A resumed run goes on bitwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero

EVERY = {"restarts": {"every": 4}}


def _cut_back(folder: Path, update: int) -> None:
    """Make a finished run look as if it had been killed after its checkpoint at ``update``."""
    for checkpoint in (folder / "checkpoints").glob("update_*"):
        if int(checkpoint.name.split("_")[1]) > update:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    "stage, precision",
    [
        (1, "bf16"),
        (3, "bf16"),
        pytest.param(0, "paper_bf16", marks=pytest.mark.long),
        pytest.param(0, "fp32", marks=pytest.mark.long),
        pytest.param(2, "fp32", marks=pytest.mark.long),
    ],
)
def test_resume_gives_bitwise_the_losses_norms_and_evaluations_of_the_unbroken_run(
    stage: int, precision: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = {"train": {"precision": precision}, "checkpoint": {"every": 1, "keep_last": 20}}
    values = settings(folder, data, **options, **EVERY)
    run_distributed(run, 2, values, zero(stage))
    unbroken = events(folder, "step"), events(folder, "eval")
    # One update before a restart, at the restart, and after it.
    for update in (7, 4, 5):
        _cut_back(folder, update)
        (folder / "metrics.jsonl").unlink()
        run_distributed(run, 2, values, zero(stage))
        assert [e["update"] for e in events(folder, "resume")] == [update]
        for kind, expected in zip(("step", "eval"), unbroken, strict=True):
            keys = ("update", "loss", "gradient_norm", "learning_rate", "tokens", "perplexity")
            for ours in events(folder, kind):
                theirs = next(e for e in expected if e["update"] == ours["update"])
                assert {k: ours.get(k) for k in keys} == {k: theirs.get(k) for k in keys}
        assert len(events(folder, "step")) == 10 - update


def test_a_half_written_checkpoint_does_not_count_and_old_ones_are_deleted(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data, checkpoint={"every": 2, "keep_last": 2})
    run_distributed(run, 1, values, zero(1))
    assert sorted(p.name for p in (folder / "checkpoints").glob("update_*")) == [
        "update_10",
        "update_8",
    ]
    expected = losses(folder)
    (folder / "checkpoints" / "update_10" / "manifest.json").unlink()
    run_distributed(run, 1, values, zero(1))
    assert [e["update"] for e in events(folder, "resume")] == [8]
    assert losses(folder) == expected


def test_a_finished_run_started_again_changes_nothing(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data)
    run_distributed(run, 1, values, zero(1))
    steps = len(events(folder, "step"))
    run_distributed(run, 1, values, zero(1))
    assert len(events(folder, "step")) == steps
    assert events(folder, "end")[-1]["updates"] == 10


def test_without_a_checkpoint_at_the_end_a_run_is_the_same_and_saves_nothing(
    data: Path, tmp_path: Path
) -> None:
    values = settings(tmp_path / "saved", data)
    run_distributed(run, 1, values, zero(1))
    values["run"]["dir"] = str(tmp_path / "unsaved")
    values["checkpoint"] = {"every": 0, "at_end": False}
    run_distributed(run, 1, values, zero(1))
    assert losses(tmp_path / "unsaved") == losses(tmp_path / "saved")
    assert events(tmp_path / "unsaved", "end")[-1]["reason"] == "finished"
    assert not list((tmp_path / "unsaved" / "checkpoints").glob("update_*"))


def test_a_run_folder_holds_what_the_documentation_says(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data, log={"tensorboard": True, "every": 3})
    run_distributed(run, 2, values, zero(2))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "ds_config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    resolved = json.loads((folder / "ds_config.json").read_text())
    assert resolved["train_batch_size"] == 12
    assert resolved["gradient_accumulation_steps"] == 3
    assert [e["update"] for e in events(folder, "step")] == [3, 6, 9, 10]
    start, end = events(folder, "start")[0], events(folder, "end")[0]
    assert start["zero_stage"] == 2 and start["world_size"] == 2
    assert end["reason"] == "finished"
    assert any((folder / "tensorboard").iterdir())
