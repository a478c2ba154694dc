"""The facts about DeepSpeed that restarts rely on or repair; see docs/dev/deepspeed-notes.md.

A failure here means that the installed DeepSpeed behaves differently: read the note, then
megalr/engine/state.py.
"""

from __future__ import annotations

import deepspeed
import pytest
import torch
import torch.distributed as dist

from megalr.engine.state import EngineState
from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, logits, message_of, train


def _states_of_groups(engine) -> list[str]:
    """What reading a moment says, for the first parameter of each group."""
    from deepspeed.utils import safe_get_full_optimizer_state

    groups = EngineState(engine).groups()
    return [message_of(safe_get_full_optimizer_state, group[0], "exp_avg") for group in groups]


def _links(kind: str, folder: str) -> list[list[str]]:
    with engine_of(kind) as engine:
        train(engine, 0)
        train(engine, 1)
        found = [_states_of_groups(engine)]
        EngineState(engine).relink()
        found.append(_states_of_groups(engine))
        engine.save_checkpoint(folder, tag="t")
        engine.load_checkpoint(folder, tag="t")
        train(engine, 2)
        found.append(_states_of_groups(engine))
        EngineState(engine).relink()
        found.append(_states_of_groups(engine))
        return found


@pytest.mark.parametrize("kind", ["fp32 stage 1", "fp32 stage 2"])
def test_states_are_linked_for_the_first_group_only_and_lost_by_an_in_process_load(
    kind: str, tmp_path
) -> None:
    (found,) = run_distributed(_links, 1, kind, str(tmp_path))
    fresh, relinked, loaded, again = found
    assert fresh[0] == "" and all("exp_avg not found" in text for text in fresh[1:])
    assert all("TypeError" in text for text in loaded)  # even after a further update
    assert relinked == again == ["", "", ""]


def _stale(kind: str) -> bool:
    """Whether a doubled master of the final norm is not seen by the model before a refresh."""
    with engine_of(kind) as engine:
        train(engine, 0)
        state, before = EngineState(engine), logits(engine)
        master = state.master(engine.module.norm.weight)
        if master is not None:
            master.mul_(2.0)
        return torch.equal(before, logits(engine))


@pytest.mark.parametrize(
    ("kind", "stale"),
    [
        ("fp32 stage 0", False),  # the master is the weight
        ("bf16 stage 0", True),
        ("fp32 stage 2", True),
        ("bf16 stage 1", True),
        ("bf16 stage 2", True),
        ("bf16 stage 3", True),
        ("fp32 stage 3", True),
    ],
)
def test_a_written_master_is_not_seen_by_the_model_before_a_refresh(kind: str, stale: bool) -> None:
    assert run_distributed(_stale, 2, kind) == [stale, stale]


def _round_robin() -> list[bool]:
    """Whether DeepSpeed's own getter gives back each parameter under round_robin_gradients."""
    from deepspeed.utils import safe_get_full_fp32_param

    with engine_of("fp32 stage 2", round_robin_gradients=True) as engine:
        return [
            torch.equal(safe_get_full_fp32_param(p), p.detach()) for p in engine.module.parameters()
        ]


def test_fragment_addresses_are_wrong_under_round_robin_gradients() -> None:
    for right in run_distributed(_round_robin, 2):
        assert not all(right)


def _stage3_layout() -> None:
    with engine_of("bf16 stage 3") as engine:
        optimizer = engine.optimizer
        assert all(group["params"] == [] for group in optimizer.optimizer.param_groups)
        world = dist.get_world_size()
        for weights, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            assert flat.numel() == sum(-(-p.ds_numel // world) for p in weights)
            assert all(p.partition_numel() == -(-p.ds_numel // world) for p in weights)
        with deepspeed.runtime.zero.GatheredParameters([engine.module.norm.weight]):
            assert tuple(engine.module.norm.weight.shape) == (20,)


def test_zero_3_cuts_every_parameter_evenly_and_shows_no_tensors_between_steps() -> None:
    run_distributed(_stage3_layout, 3)
