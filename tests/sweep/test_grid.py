"""A sweep file becomes named runs with these settings; its mistakes are named, one a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megalr.errors import UserError
from megalr.models.build import build_model
from megalr.sweep.grid import number_label, plan_runs
from megalr.sweep.sweep_file import read_sweep_file
from tests.sweep.files import BASE, plan, write_sweep

ROOT = Path(__file__).parents[2]
LOW = {
    "set": ["method.rank=4", "train.updates=5"],
    "seeds": [1, 2],
    "axes": {
        "lr": {"key": "optimizer.lr", "values": [1e-3, 0.02]},
        "ratio": {
            "keys": ["optimizer.lr_ratio.embedding", "optimizer.lr_ratio.head"],
            "values": [1, 3],
        },
        "restarts": {"choices": {"none": [], "both": ["restarts.every=2"]}},
    },
}


def mistakes(path: Path, **scope: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        plan(path, path.parent / "out", **scope)
    first, *rest = str(caught.value).splitlines()
    return [line.strip() for line in rest] or [first]


def test_runs_are_all_combinations_with_names_that_say_which(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, set=["train.updates=4"], groups={"low": LOW, "full": {}})
    runs = plan(path, tmp_path / "out")
    assert [run.name for run in runs] == [
        f"low__lr={lr}__ratio={ratio}__restarts={restarts}__seed={seed}"
        for lr in ("1e-3", "0.02")
        for ratio in (1, 3)
        for restarts in ("none", "both")
        for seed in (1, 2)
    ] + ["full__seed=7"]
    config = {run.name: run.config for run in runs}
    one = config["low__lr=0.02__ratio=3__restarts=both__seed=2"]
    assert (one.optimizer.lr, one.run.seed, one.restarts.every) == (0.02, 2, 2)
    ratio = one.optimizer.lr_ratio
    assert (ratio.embedding, ratio.head, ratio.norms) == (3, 3, 1)
    assert one.train.updates == 5 and one.method.rank == 4  # the group's set replaces the sweep's
    assert one.run.dir == str(
        tmp_path / "out" / "runs" / "low__lr=0.02__ratio=3__restarts=both__seed=2"
    )
    full = config["full__seed=7"]
    assert (full.train.updates, full.restarts.every, full.run.seed) == (4, None, 7)


def test_the_command_of_a_run_loads_as_the_planned_configuration(tmp_path: Path) -> None:
    from megalr.config import load_run_config

    for run in plan(write_sweep(tmp_path, groups={"low": LOW}), tmp_path / "a folder"):
        base, *overrides = run.arguments[1:]
        assert load_run_config([base], overrides) == run.config


def test_labels_of_numbers_are_exact_and_short() -> None:
    shown = [1e-3, 2e-3, 1.5e-3, 0.25, 0.01, 1, 1.0, 10, 256, 3e-5, 1e6, 123456, 0.1 + 0.2]
    assert " ".join(map(number_label, shown)) == (
        "1e-3 2e-3 1.5e-3 0.25 0.01 1 1 10 256 3e-5 1e6 123456 0.30000000000000004"
    )
    for value in np.exp(np.random.default_rng(0).uniform(-30, 30, 300)).tolist():
        assert float(number_label(value)) == value


def test_size_of_weights_and_states_is_that_of_the_model_built(tmp_path: Path) -> None:
    (tmp_path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}', encoding="utf-8")
    path = write_sweep(tmp_path, deepspeed_config="zero0.json", groups={"g": {}})
    (run,) = plan(path, tmp_path / "out")
    decoder = build_model(run.config, torch.device("cpu"))
    stored = sum(parameter.numel() for parameter in decoder.parameters())
    assert run.states_gib == pytest.approx(12 * stored / 2**30, rel=1e-3)  # and step counters


def test_paths_start_from_the_folder_of_the_file_or_an_earlier_one(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "deep", groups={"g": {}})
    (run,) = plan(path, tmp_path / "out")
    assert run.base == tmp_path / "deep" / "base.yaml"
    path = write_sweep(tmp_path / "deep", base="gone.yaml", groups={"g": {}})
    assert mistakes(path) == [f"groups.g: gone.yaml: no such file in {tmp_path / 'deep'}"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grups": {}}, "unknown key; did you mean groups?"),
        ({"groups": {}}, "groups = {}: .*at least 1"),
        ({"base": None}, r"groups.g: no base here and none of the sweep"),
        ({"groups": {"g": {"axis": {}}}}, "groups.g.axis = {}: unknown key; did you mean axes?"),
        ({"groups": {"g__h": {}}}, "'g__h': must consist of letters, digits"),
        ({"groups": {"g": {"axes": {"lr": {"key": "optimizer.lr"}}}}}, "axes.lr: no values"),
        ({"groups": {"g": {"axes": {"lr": {"key": "optimizer.lr", "values": []}}}}}, "lr.values"),
        (
            {"groups": {"g": {"axes": {"lr": {"values": [1]}}}}},
            "needs one of key, keys and",
        ),
        ({"groups": {"g": {"axes": {"a": {"choices": {"x": ["lr"]}}}}}}, "section.key=value"),
        ({"set": ["train.updates"]}, "must have the form section.key=value"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"seeds": []}, "seeds = .*at least 1"),
        ({"set": ["run.dir=x"]}, "gives run.dir, which the sweep chooses"),
        ({"set": ["train.updates=1", "train.updates=2"]}, "set gives train.updates twice"),
        ({"seeds": [1], "set": ["run.seed=2"]}, "run.seed is set and there are seeds"),
        ({"seeds": [1, 1]}, "g__seed=1: planned twice"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (found,) = mistakes(write_sweep(tmp_path, **{"groups": {"g": {}}, **change}))
    assert re.search(message, found), found


def test_all_wrong_runs_are_named_before_the_first_starts(tmp_path: Path) -> None:
    axes = {
        "lr": {"key": "optimizer.lr", "values": [1e-3, -1]},
        "batch": {"key": "train.global_batch_size", "values": [12, 24]},
    }
    path = write_sweep(tmp_path, set=["train.updatess=4"], groups={"a": {"axes": axes}, "b": {}})
    first, second = mistakes(path)
    assert first.startswith("a__lr=1e-3__batch=12 and 4 more: command line: train.updatess = 4: ")
    assert second.startswith("a__lr=-1__batch=12 and 1 more: command line: optimizer.lr = -1: ")
    axes = {"batch": {"key": "train.global_batch_size", "values": [12, 13]}}
    (line,) = mistakes(write_sweep(tmp_path, groups={"a": {"axes": axes}}))
    assert line.startswith("a__batch=13: ") and "global_batch_size" in line
    assert not (tmp_path / "out").exists()


def test_an_axis_and_the_command_line_may_not_set_the_same_key(tmp_path: Path) -> None:
    axes = {"lr": {"key": "optimizer.lr", "values": [1e-3]}}
    path = write_sweep(tmp_path, set=["optimizer.lr=5"], groups={"g": {"axes": axes}})
    (run,) = plan(path, tmp_path / "out")
    assert run.config.optimizer.lr == 1e-3  # an axis replaces set
    assert (
        "axis lr sets optimizer.lr, which is also"
        in mistakes(path, overrides=["optimizer.lr=1"])[0]
    )
    twice = {"a": axes["lr"], "b": axes["lr"]}
    path = write_sweep(tmp_path, groups={"g": {"axes": twice}})
    assert "axis b sets optimizer.lr, which is also" in mistakes(path)[0]


def test_a_value_of_text_becomes_a_name_of_a_file(tmp_path: Path) -> None:
    axes = {"data": {"key": "data.train", "values": ["a/b c", "ü"]}}
    runs = plan(write_sweep(tmp_path, groups={"g": {"axes": axes}}), tmp_path / "out")
    assert [run.name for run in runs] == ["g__data=a-b-c__seed=7", "g__data=empty__seed=7"]
    assert [run.config.data.train[0].path for run in runs] == ["a/b c", "ü"]
    assert yaml.safe_load((tmp_path / "base.yaml").read_text())["run"] == BASE["run"]


def test_shipped_sweeps_can_be_planned(tmp_path: Path) -> None:
    files = (ROOT / "recipes" / "sweeps").glob("*.yaml")
    shipped = [path for path in files if not path.stem.endswith("_base")]
    for path in shipped:
        assert plan_runs(read_sweep_file(path), [ROOT], tmp_path)
    assert shipped
