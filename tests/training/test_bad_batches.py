"""Bad batches: skipped on all ranks, passed over by a rollback; spikes do what they are set to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megalr.engine.wrappers import ZeRO12
from tests.ranks import RankFailed, run_distributed
from tests.training.bad_batches import (
    run_and_see_the_engine,
    run_with_bad_batches,
    run_with_high_losses,
    run_without_batches,
)
from tests.training.runs import events, losses, settings, zero

SMALL: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "updates": 8}
OFFLOAD: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
TOLD = ("update", "batch", "skipped", "skipped_in_row", "loss", "to_update")
KEPT = (*TOLD, "gradient_norm", "learning_rate", "tokens")
SEEN = ("update", "loss", "gradient_norm", "learning_rate", "tokens", "perplexity")


def _values(folder: Path, data: Path, **sections: Any) -> dict[str, Any]:
    sections["train"] = {**SMALL, **sections.get("train", {})}
    sections.setdefault("evaluation", {"every": 0, "tokens": 500})
    return settings(folder, data, **sections)


@pytest.mark.parametrize(
    "ds, precision, tensor",
    [
        (zero(0), "fp32", 1),
        (zero(0), "bf16", 1),
        (zero(1), "bf16", 1),
        (zero(2), "fp32", 1),
        (zero(2, **OFFLOAD), "bf16", 1),
        (zero(3), "bf16", 1),
        (zero(0), "fp32", 2),
        (zero(0), "paper_bf16", 1),
        (zero(0), "paper_bf16", 2),
        (zero(1), "bf16", 2),
    ],
)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all_and_touches_nothing(
    ds: dict[str, Any], precision: str, tensor: int, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = _values(
        folder,
        data,
        train={"precision": precision},
        checkpoint={"every": 0},
        parallel={"tensor": tensor},
    )
    bad = {0: "nan_loss", 3: "nan_gradient", 5: "inf_loss"}
    for seen in run_distributed(run_with_bad_batches, 2, values, ds, bad):
        assert [update for update, _, _ in seen] == list(range(1, 9))
        skipped = [update for update, masters, moments in seen if not masters and not moments]
        # At update 2 the learning rate is that of update 1's place in the warm-up, above 0.
        assert skipped == [1, 4, 6]
    found = events(folder, "skip")
    assert [(e["update"], e["batch"], e["reason"]) for e in found] == [
        (1, 0, "non_finite"),
        (4, 3, "non_finite"),
        (6, 5, "non_finite"),
    ]
    assert [e["skipped"] for e in found] == [1, 2, 3]
    steps = {e["update"]: e for e in events(folder, "step")}
    assert sorted(steps) == list(range(1, 9))
    assert all((steps[u]["loss"] == steps[u]["loss"]) != (u in (1, 4, 6)) for u in steps)
    # Schedule and data go on: the same learning rates and tokens as without bad batches.
    assert steps[8]["tokens"] - steps[7]["tokens"] <= 8 * 24
    assert steps[3]["learning_rate"] == pytest.approx(0.01 * 2 / 3)
    assert events(folder, "end")[0]["skipped"] == 3


@pytest.mark.parametrize("stage, precision", [(1, "bf16"), (0, "paper_bf16")])
def test_an_update_that_is_heard_of_late_is_left_out_all_the_same(
    stage: int, precision: str, data: Path, tmp_path: Path
) -> None:
    """And reported alike: every event but times is that of a run that waits for every update."""
    bad = {2: "nan_gradient", 5: "nan_loss", 6: "inf_loss"}
    found, late, skipped = [], [], []
    for may_wait in (False, True):
        folder = tmp_path / str(may_wait)
        values = _values(
            folder,
            data,
            train={"precision": precision, "updates": 11, "gradient_clipping": 0.5},
            checkpoint={"every": 4},
            restarts={"every": 4},
            health={"max_skipped": 2},
        )
        seen = run_distributed(run_and_see_the_engine, 2, values, zero(stage), bad, may_wait)
        assert seen[0] == seen[1]
        late.append(seen[0][0])
        skipped.append(seen[0][1])
        kinds = ("step", "skip", "rollback", "restart", "checkpoint", "eval", "end")
        found.append(
            {
                kind: [
                    {key: repr(e[key]) for key in KEPT if key in e} for e in events(folder, kind)
                ]
                for kind in kinds
            }
        )
    assert found[0] == found[1]  # as text: NaN is the loss of an update left out
    assert len(found[0]["step"]) == 6 + 7  # not 7, which the rollback left out
    # 1 has no moments yet; after 6 is left out nothing waits until the rollback to 4.
    assert late == [[], [2, 3, 5, 6, 5, 6, 7, 9, 10]]
    assert skipped[0] == skipped[1] and skipped[0][0] == 1
    assert [e["update"] for e in found[0]["skip"]] == ["3", "6", "7"]
    assert [e["update"] for e in found[0]["rollback"]] == ["7"]


def _told(folder: Path, kind: str) -> list[dict[str, str]]:
    """The events of a kind but for their times."""
    return [{key: repr(e[key]) for key in KEPT if key in e} for e in events(folder, kind)]


def test_deepspeed_keeps_a_bad_gradient_for_ever_when_it_offloads(
    data: Path, tmp_path: Path
) -> None:
    """The reason for ``ZeRO12._after_skip``; if this fails it is no longer needed."""
    folder = tmp_path / "run"
    values = _values(folder, data, train={"precision": "bf16"}, checkpoint={"every": 0})
    run_distributed(_run_without_forgetting, 2, values, zero(2, **OFFLOAD), {3: "nan_loss"})
    assert [e["update"] for e in events(folder, "skip")] == [4, 5, 6, 7, 8]


def _run_without_forgetting(
    values: dict[str, Any], ds: dict[str, Any], bad: dict[int, str]
) -> None:
    with patch.object(ZeRO12, "_after_skip", lambda self: None):
        run_with_bad_batches(values, ds, bad)


@pytest.mark.parametrize(
    "stage, precision, sections",
    [
        pytest.param(1, "bf16", {}, marks=pytest.mark.long),
        (2, "fp32", {"method": {"name": "galore", "rank": 4, "update_proj_gap": 3}}),
        (3, "bf16", {}),
        pytest.param(1, "bf16", {"parallel": {"tensor": 2}}, marks=pytest.mark.long),
        pytest.param(
            2, "fp32", {"parallel": {"tensor": 2, "layout": "bottleneck"}}, marks=pytest.mark.long
        ),
    ],
)
def test_after_a_rollback_the_run_is_the_one_without_the_batches_left_out(
    stage: int, precision: str, sections: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    restarts = {"reset_every": 4} if "method" in sections else {"every": 4}
    options: dict[str, Any] = {
        "train": {"precision": precision, "updates": 10},
        "checkpoint": {"every": 4, "keep_last": 9},
        "restarts": restarts,
        "health": {"max_skipped": 2},
        **sections,
    }
    ours, reference = tmp_path / "ours", tmp_path / "reference"
    bad = {5: "nan_loss", 6: "nan_gradient"}
    run_distributed(run_with_bad_batches, 2, _values(ours, data, **options), zero(stage), bad)
    run_distributed(run_without_batches, 2, _values(reference, data, **options), zero(stage), 4, 3)

    (rollback,) = events(ours, "rollback")
    assert (rollback["update"], rollback["to_update"]) == (7, 4)
    assert (rollback["first_batch_left_out"], rollback["batches_left_out"]) == (4, 3)
    assert rollback["reason"] == "2 updates in a row were skipped"
    assert _by_update(ours, "step") == _by_update(reference, "step")
    assert _by_update(ours, "eval") == _by_update(reference, "eval")
    done = [(e["update"], e["reset"], e["fraction_reset"]) for e in events(ours, "restart")]
    assert done == [(4, True, 1.0), (8, True, 1.0)]

    # Killed after its checkpoint at 8, it goes on with the right batches.
    (ours / "metrics.jsonl").unlink()
    shutil.rmtree(ours / "checkpoints" / "update_10")
    run_distributed(run_with_bad_batches, 2, _values(ours, data, **options), zero(stage), bad)
    assert [e["update"] for e in events(ours, "resume")] == [8]
    again = _by_update(ours, "step")
    assert sorted(again) == [9, 10]
    assert all(again[u] == step for u, step in _by_update(reference, "step").items() if u > 8)
    assert events(ours, "end")[0]["rollbacks"] == 1


def _by_update(folder: Path, kind: str) -> dict[int, dict[str, Any]]:
    """The last event of each update, what two equal runs have in common."""
    return {e["update"]: {k: e.get(k) for k in SEEN} for e in events(folder, kind)}


def test_a_run_ends_with_one_line_when_rolling_back_does_not_help(
    data: Path, tmp_path: Path
) -> None:
    bad = dict.fromkeys(range(3, 99), "nan_loss")
    folder = tmp_path / "run"
    values = _values(
        folder, data, checkpoint={"every": 2}, health={"max_skipped": 2, "max_rollbacks": 2}
    )
    with pytest.raises(
        RankFailed, match=r"AgreedError: 2 updates in a row were skipped at update "
    ):
        run_distributed(run_with_bad_batches, 1, values, zero(1), bad, True)
    assert [e["to_update"] for e in events(folder, "rollback")] == [2, 2]
    assert [e["batches_left_out"] for e in events(folder, "rollback")] == [3, 5]
    # No checkpoint was made among skipped updates.
    assert [e["update"] for e in events(folder, "checkpoint")] == [2]
    early = _values(tmp_path / "early", data, checkpoint={"every": 5}, health={"max_skipped": 1})
    with pytest.raises(RankFailed, match=r"at update 4, before the first checkpoint: lower"):
        run_distributed(run_with_bad_batches, 1, early, zero(1), bad, True)


@pytest.mark.parametrize("action", ["log", "skip", "reset", "rollback"])
def test_a_spike_does_what_it_is_set_to(action: str, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    health = {"spike_window": 8, "spike_threshold": 20.0, "spike_action": action}
    values = _values(
        folder, data, health=health, checkpoint={"every": 5}, log={"every": 4}, train={"updates": 9}
    )
    run_distributed(run_with_high_losses, 2, values, zero(1), [6], 50.0)
    spikes = {(e["of"], e["update"], e["batch"]) for e in events(folder, "spike")}
    both = {("loss", 7, 6), ("gradient_norm", 7, 6)}
    assert spikes == ({("loss", 7, 6)} if action == "skip" else both)
    skips = [(e["update"], e["reason"]) for e in events(folder, "skip")]
    assert skips == ([(7, "spike")] if action == "skip" else [])
    resets = [(e["update"], e["fraction_reset"]) for e in events(folder, "reset")]
    assert resets == ([(7, 1.0)] if action == "reset" else [])
    rollbacks = [
        (e["update"], e["to_update"], e["batches_left_out"]) for e in events(folder, "rollback")
    ]
    assert rollbacks == ([(7, 5, 2)] if action == "rollback" else [])
    assert events(folder, "end")[0]["updates"] == 9
    assert len(losses(folder)) == 3
