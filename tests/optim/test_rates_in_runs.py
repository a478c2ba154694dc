"""Runs with rates by kind of parameter agree whatever way they are shared, and resume bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.test_shapes import BY_KIND, EVERY, continued
from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero


@pytest.mark.long
def test_rates_by_kind_under_tensor_parallelism_and_zero_and_after_a_resume(
    data: Path,
    tmp_path: Path,
) -> None:
    sections = {"optimizer": BY_KIND, **EVERY, "train": {"updates": 8}, "evaluation": {"every": 0}}
    folders = {name: tmp_path / name for name in ("alone", "tensor", "zero1", "plain")}
    run_distributed(run, 1, settings(folders["alone"], data, **sections), zero(0))
    expected = losses(folders["alone"])
    parallel = {"tensor": 2, "layout": "bottleneck"}
    values = settings(folders["tensor"], data, **sections, parallel=parallel)
    run_distributed(run, 2, values, zero(1))
    assert losses(folders["tensor"]) == pytest.approx(expected, abs=1e-5)
    run_distributed(run, 2, settings(folders["zero1"], data, **sections), zero(1))
    assert losses(folders["zero1"]) == pytest.approx(expected, abs=1e-5)
    plain = {**sections, "optimizer": {"weight_decay": 0.1}}
    run_distributed(run, 1, settings(folders["plain"], data, **plain), zero(0))
    assert abs(losses(folders["plain"])[-1] - expected[-1]) > 1e-3
    (start,) = events(folders["alone"], "start")
    assert start["parameter_groups"] == {
        "factors": {"lr": 0.01, "weight_decay": 0.1},
        "embedding": {"lr": 0.03, "weight_decay": 0.1},
        "head": {"lr": 0.005, "weight_decay": 0.0},
        "vectors": {"lr": 0.02, "weight_decay": 0.0},
    }
    again = continued(folders["zero1"], tmp_path / "again", 5)
    run_distributed(run, 2, settings(again, data, **sections), zero(1))
    assert losses(again) == losses(folders["zero1"])[5:]
