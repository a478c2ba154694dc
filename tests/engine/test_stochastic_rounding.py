"""The bits of stochastic rounding in engines: of any number of ranks, any ZeRO stage, any start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.data.loader import UpdateBatch
from megalr.engine.build import build_engine
from megalr.engine.config import resolve_deepspeed_config
from megalr.engine.state import EngineState
from megalr.models.build import build_model
from megalr.training.step import train_step
from tests.engine.test_unwrapped_step import _micro_batch
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import mesh
from tests.training.runs import events, losses, run, settings, zero
from tests.training.test_resume import _cut_back

UPDATES = 3
Found = dict[str, dict[str, torch.Tensor]]


def _trained(stage: int, choice: str, tensor: int = 1) -> Found:
    """Whole masters and moments after updates in which all ranks read the same batch.

    So the averaged gradient has the same bits for any number of ranks.
    """
    world = dist.get_world_size() // tensor
    config = RunConfig.model_validate(
        settings(
            Path("unused"),
            Path("unused"),
            train={
                "precision": "paper_bf16",
                "global_batch_size": 2 * world,
                "gradient_clipping": 0.0,
            },
            optimizer={"stochastic_rounding": choice},
            parallel={"tensor": tensor},
        )
    )
    resolved = resolve_deepspeed_config(config, zero(stage), "test", world)
    decoder = build_model(config, torch.device("cpu"), mesh(tensor))
    engine = build_engine(config, resolved, decoder)
    for update in range(UPDATES):
        micro = [_micro_batch(update, 0, 0)]
        batch = UpdateBatch(update, micro, 48 * world, (0,))
        assert train_step(engine, batch, update + 1, 0.01).applied
    found = _whole(EngineState(engine))
    engine.destroy()
    return found


def _whole(state: EngineState) -> Found:
    found: Found = {}
    for parameter in state.parameters():
        start, stop = state.held(parameter)
        parts = {"master": state.master(parameter), **state.states(parameter)}
        whole = found[state.name(parameter)] = {}
        for key in ("master", "exp_avg", "exp_avg_sq"):
            values = torch.zeros(state.numel(parameter), dtype=torch.float32)
            if parts.get(key) is not None:
                assert parts[key].dtype == torch.bfloat16
                values[start:stop] = parts[key]
            if not state.replicated:
                dist.all_reduce(values, group=state.process_group)
            whole[key] = values
    return found


def _same(one: Found, other: Found) -> list[bool]:
    """For master, exp_avg and exp_avg_sq: whether all parameters have the same bits."""
    keys = ("master", "exp_avg", "exp_avg_sq")
    return [all(torch.equal(one[n][key], other[n][key]) for n in one) for key in keys]


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    """One rank without ZeRO, for every choice."""
    choices = ("none", "moments", "weights", "all")
    return {choice: run_distributed(_trained, 1, 0, choice)[0] for choice in choices}


@pytest.mark.parametrize("ranks, stage", [(1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_any_ranks_and_stage_round_to_the_same_bits(
    ranks: int, stage: int, alone: dict[str, Found]
) -> None:
    for one in run_distributed(_trained, ranks, stage, "all"):
        assert _same(one, alone["all"]) == [True] * 3


def test_each_choice_rounds_what_it_names(alone: dict[str, Found]) -> None:
    """Moments of later updates follow from changed weights, so the first update tells."""
    assert _same(alone["none"], alone["moments"])[1:] == [False, False]
    assert _same(alone["weights"], alone["all"])[1:] == [False, False]
    assert not _same(alone["none"], alone["weights"])[0]
    for choice, found in alone.items():
        for name, tensors in found.items():
            master, plain = tensors["master"], alone["none"][name]["master"]
            assert (master - plain).abs().max() < 0.05, choice


def test_tensor_parallel_ranks_keep_what_they_share_equal() -> None:
    one, other = run_distributed(_trained, 2, 0, "all", 2)
    shared = [name for name in one if "norm" in name]
    assert shared
    for name in shared:
        assert torch.equal(one[name]["master"], other[name]["master"])
        assert torch.equal(one[name]["exp_avg_sq"], other[name]["exp_avg_sq"])


@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_with_restarts_resumes_bitwise(stage: int, data: Path, tmp_path: Path) -> None:
    """Draws do not start again with the step counter, nor with the process."""
    sections: dict[str, Any] = {
        "train": {"precision": "paper_bf16"},
        "optimizer": {"stochastic_rounding": "all"},
        "restarts": {"every": 4},
        "checkpoint": {"every": 5, "keep_last": 9},
    }
    values = settings(tmp_path / "run", data, **sections)
    run_distributed(run, 2, values, zero(stage))
    unbroken = losses(tmp_path / "run")
    _cut_back(tmp_path / "run", 5)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run_distributed(run, 2, values, zero(stage))
    assert [e["update"] for e in events(tmp_path / "run", "resume")] == [5]
    assert losses(tmp_path / "run") == unbroken[5:]


@pytest.mark.parametrize(
    "sections, message",
    [
        ({}, "train.precision fp32 keeps weights and optimizer state in float32"),
        (
            {"method": {"name": "galore", "rank": 4}, "train": {"precision": "paper_bf16"}},
            "method galore brings its own update rule, which rounds to nearest",
        ),
    ],
)
def test_where_there_is_nothing_to_round_is_said(sections: dict[str, Any], message: str) -> None:
    values = settings(
        Path("x"), Path("x"), **{**sections, "optimizer": {"stochastic_rounding": "moments"}}
    )
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values)
