"""Restarts of a run that is started as users start it: events, learning rate, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalr.checkpoint import open_checkpoint
from megalr.config.schema import RunConfig
from megalr.hf.trained_run import load_decoder
from tests.ranks import run_distributed
from tests.restarts.engines import message_of
from tests.synthetic import write_dataset
from tests.training.runs import events, losses, run, settings, zero


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


def test_a_run_reports_its_restarts_and_recovers_its_learning_rate(
    data: Path, tmp_path: Path
) -> None:
    restarts = {
        "refactorize_every": 2,
        "reset_every": 5,
        "reset_scope": "factors",
        "lr_recovery": "linear",
        "recovery_updates": 2,
        "stop_before": 2,
        "verify": True,
    }
    schedule = {"name": "constant", "warmup_updates": 0}
    values = settings(tmp_path / "run", data, restarts=restarts, schedule=schedule)
    run_distributed(run, 2, values, zero(2))
    happened = events(tmp_path / "run", "restart")
    assert [(e["update"], e["refactorized"], e["reset"]) for e in happened] == [
        (2, True, False),
        (4, True, False),
        (5, False, True),
        (6, True, False),
        (8, True, False),
    ]
    reset = happened[2]
    assert 0 < reset["fraction_reset"] < 1 and reset["moments_reset"] == "first, second"
    assert "layers.*.attention.qkv.a x2" in reset["parameters_reset"]
    assert all(e["verified"] and e["matrices"] == 14 for e in happened if e["refactorized"])
    rates = [event["learning_rate"] for event in events(tmp_path / "run", "step")]
    expected = [1.0] * 5 + [1 / 3, 2 / 3] + [1.0] * 3
    assert rates == pytest.approx([0.01 * factor for factor in expected])
    assert events(tmp_path / "run", "end")[0]["restart_share"] > 0
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_can_spare_embedding_and_head(data: Path, tmp_path: Path, optimizer: str) -> None:
    """They have groups of their own then, since ZeRO keeps one step counter for a group."""
    values = settings(
        tmp_path / "run",
        data,
        method={"name": "full_rank"},
        optimizer={"name": optimizer, "lr": 1e-2},
        restarts={"reset_every": 4, "reset_scope": "layers"},
    )
    run_distributed(run, 2, values, zero(1))
    reset, *_ = events(tmp_path / "run", "restart")
    assert "layers.*.attention.qkv.weight x2" in reset["parameters_reset"]
    assert "norm.weight" in reset["parameters_reset"]
    assert not re.search("embedding|head", reset["parameters_reset"])
    (start,) = events(tmp_path / "run", "start")
    assert {"embedding", "head"} < set(start["parameter_groups"])


def test_matrices_of_different_ranks_are_balanced_each(data: Path, tmp_path: Path) -> None:
    method = {"name": "low_rank", "rank": 8, "ranks": {"q": 4, "layers.1.*": 12, "down": 6}}
    sections = {"method": method, "restarts": {"refactorize_every": 4, "verify": True}}
    sections |= {"train": {"updates": 5}, "checkpoint": {"every": 1, "keep_last": 9}}
    run_distributed(run, 2, settings(tmp_path / "run", data, **sections), zero(2))
    (event,) = events(tmp_path / "run", "restart")
    assert event["verified"] and event["matrices"] == 14
    assert event["spectra"]["q"]["rank"] == 12 and event["spectra"]["down"]["rank"] == 6
    decoders = [
        load_decoder(tmp_path / "run", open_checkpoint(tmp_path / "run", f"update_{update}"))
        for update in (3, 4)
    ]
    for before, pair in zip(*(decoder.factor_pairs() for decoder in decoders), strict=True):
        b, a = pair.b[slice(*pair.b_rows)].double(), pair.a[slice(*pair.a_rows)].double()
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-5, atol=1e-6)
        assert before.rank == pair.rank == len(a)


def test_refactorization_of_a_dense_model_is_refused_and_reset_alone_works(
    data: Path, tmp_path: Path
) -> None:
    dense = {"method": {"name": "full_rank"}}
    values = settings(tmp_path / "refused", data, restarts={"every": 3}, **dense)
    (message,) = run_distributed(message_of, 1, run, values, zero(1))
    assert message.startswith("UserError: restarts.every = 3 asks for refactorization")
    values = settings(tmp_path / "run", data, restarts={"reset_every": 3}, **dense)
    run_distributed(run, 1, values, zero(1))
    happened = events(tmp_path / "run", "restart")
    assert [(e["update"], e["fraction_reset"]) for e in happened] == [(3, 1.0), (6, 1.0), (9, 1.0)]


def _extend(values: dict[str, Any], ds_user: dict[str, Any]) -> None:
    from megalr.training.pretrain import pretrain

    pretrain(RunConfig.model_validate(values), ds_user, "test.json", allowed=("train.updates",))


@pytest.mark.parametrize(
    "last, restarts",  # a restart is due after the last update of the shorter run
    [
        (8, {"every": 4}),
        (8, {"imbalance_threshold": 1e-4, "imbalance_every": 8, "refactorize_every": 5}),
        (7, {"gradient_norm_spike": 1.001, "spike_window": 4}),
    ],
)
def test_an_extended_run_equals_the_unbroken_longer_one(
    last: int, restarts: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    sections = {
        "restarts": restarts,
        "schedule": {"name": "constant", "warmup_updates": 2},
        "checkpoint": {"every": 100},
        "evaluation": {"every": 0},
    }
    unbroken, extended = tmp_path / "unbroken", tmp_path / "extended"
    run_distributed(run, 2, settings(unbroken, data, **sections, train={"updates": 12}), zero(1))
    run_distributed(run, 2, settings(extended, data, **sections, train={"updates": last}), zero(1))
    assert all(e["update"] < last for e in events(extended, "restart"))  # its moments are kept
    again = settings(extended, data, **sections, train={"updates": 12})
    run_distributed(_extend, 2, again, zero(1))
    assert losses(extended) == losses(unbroken)
    expected = [(e["update"], e["trigger"]) for e in events(unbroken, "restart")]
    assert [(e["update"], e["trigger"]) for e in events(extended, "restart")] == expected
    assert last in dict(expected) and 12 not in dict(expected)
