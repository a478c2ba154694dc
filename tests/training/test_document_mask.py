"""Runs with document masks: losses by hand from single documents, resuming, evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.data import open_training_data
from megalr.data.megatron_index import IndexedShard
from megalr.evaluation.offline import Request, evaluate_run
from megalr.models.build import build_model
from megalr.models.flops import flops_per_token
from tests.ranks import RankFailed, run_distributed
from tests.synthetic import write_dataset
from tests.training.runs import events, losses, run, settings, zero

LENGTH = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


def _values(folder: Path, data: Path, **sections: Any) -> dict[str, Any]:
    return settings(folder, data, data={"document_mask": True}, **sections)


def _loss_of_documents(config: RunConfig, data: Path) -> tuple[float, int]:
    """Mean loss and targets of the first global batch, its documents read and computed alone."""
    samples = open_training_data(data, sequence_length=LENGTH).sample_ids(
        np.arange(config.train.global_batch_size), config.run.seed
    )
    shard = IndexedShard(data / "train-00000")
    starts = np.concatenate([[0], np.cumsum(shard.lengths)])
    decoder = build_model(config, torch.device("cpu"))
    total, targets = 0.0, 0
    for sample in samples.tolist():
        first, stop = sample * LENGTH, min((sample + 1) * LENGTH, shard.num_tokens)
        inside = starts[(starts > first) & (starts < stop)].tolist()
        for begin, end in zip([first, *inside], [*inside, stop], strict=True):
            # The last label of a window is the token behind it, if that is of the same document.
            after = int(end == stop and stop < shard.num_tokens and stop not in starts)
            ids = torch.tensor(shard.tokens[begin : end + after].astype(np.int64))
            labels = torch.cat((ids[1:], torch.full((1 - after,), -100)))
            ids = ids[: len(labels)]
            with torch.no_grad():
                total += float(decoder(ids[None], labels[None]))
            targets += int((labels != -100).sum())
    return total / targets, targets


def test_the_first_loss_is_that_of_the_documents_alone(data: Path, tmp_path: Path) -> None:
    values = _values(tmp_path / "one", data, train={"updates": 1}, schedule={"warmup_updates": 0})
    run_distributed(run, 1, values, zero(0))
    (step,) = events(tmp_path / "one", "step")
    loss, targets = _loss_of_documents(RunConfig.model_validate(values), data)
    assert step["loss"] == pytest.approx(loss, rel=1e-5)
    assert step["tokens"] == targets


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_do_not_depend_on_ranks_stage_or_recomputation(
    stage: int, data: Path, tmp_path: Path
) -> None:
    expected = _values(tmp_path / "one", data)
    run_distributed(run, 1, expected, zero(0))
    train = {"micro_batch_size": 3, "activation_checkpointing": "full"}
    run_distributed(run, 2, _values(tmp_path / "two", data, train=train), zero(stage))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_run_resumes_bitwise_evaluates_alike_and_keeps_its_setting(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = _values(folder, data)
    run_distributed(run, 1, values, zero(1))
    expected, evaluated = losses(folder), events(folder, "eval")
    shutil.rmtree(folder / "checkpoints" / "update_10")
    run_distributed(run, 1, values, zero(1))
    assert [e["update"] for e in events(folder, "resume")] == [5]
    assert losses(folder) == expected
    assert events(folder, "eval")[-1]["loss"] == evaluated[-1]["loss"]
    found = evaluate_run(folder, None, Request(), torch.device("cpu"))
    last = events(folder, "eval")[-1]
    assert found["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert (found["tokens"], found["document_mask"]) == (last["tokens"], True)
    other = evaluate_run(folder, None, Request(document_mask=False), torch.device("cpu"))
    assert other["tokens"] > found["tokens"] and abs(other["loss"] - found["loss"]) > 1e-4
    documents = evaluate_run(folder, None, Request(packing=False), torch.device("cpu"))
    assert not documents["document_mask"]
    with pytest.raises(RankFailed, match=r"data\.document_mask"):
        run_distributed(run, 1, settings(folder, data), zero(1))


def test_the_attention_that_masks_leave_counts_as_work(data: Path) -> None:
    """FLOPs of attention are those of the mean of (position + 1) positions."""
    config = RunConfig.model_validate(_values(Path("nowhere"), data))
    decoder = build_model(config, torch.device("cpu"))
    dataset = open_training_data(data, sequence_length=LENGTH, document_mask=True)
    visible = dataset.mean_visible(0, None)
    everything = dataset.read(np.arange(dataset.num_samples))[2]
    assert visible == pytest.approx(np.mean(everything + 1), rel=0.05)
    none = flops_per_token(decoder, LENGTH, 0)
    full = flops_per_token(decoder, LENGTH) - none
    ours = flops_per_token(decoder, LENGTH, visible) - none
    assert ours / full == pytest.approx(visible / ((LENGTH + 1) / 2))
