"""Masters, moments and weights inside engines of every kind, against DeepSpeed's own API."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalr.restarts.state import ShardedState
from tests.distributed import run_distributed
from tests.restarts.engines import KINDS, engine_of, logits, message_of, train


def _whole(state: ShardedState, parameter, fragment) -> torch.Tensor:
    """The fragments of all ranks put together; stage 0: this rank's."""
    if state.replicated:
        return fragment.detach().float().view(state.shape(parameter))
    start, stop = state.held(parameter)
    pieces: list = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, (start, stop, None if fragment is None else fragment.float()))
    whole = torch.full((state.numel(parameter),), float("nan"))
    for low, high, values in pieces:
        if values is not None:
            assert whole[low:high].isnan().all()  # no element is held twice
            whole[low:high] = values
    assert not whole.isnan().any()
    return whole.view(state.shape(parameter))


def _compare_with_deepspeed(kind: str) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    with engine_of(kind) as engine:
        state = ShardedState(engine)
        named = dict(engine.module.named_parameters())
        assert {state.name(p) for p in state.parameters()} == set(named)
        assert sum(map(len, state.groups())) == len(named)
        if engine.zero_optimization_stage() > 0:
            assert all(state.states(p) == {} for p in state.parameters())  # before the first update
        for update in range(2):
            train(engine, update)
        state.relink()
        for parameter in state.parameters():
            master = _whole(state, parameter, state.master(parameter))
            expected = {"master": safe_get_full_fp32_param(parameter)}
            found = {"master": master}
            for name in ("exp_avg", "exp_avg_sq"):
                found[name] = _whole(state, parameter, state.states(parameter).get(name))
                if engine.zero_optimization_stage() > 0:
                    expected[name] = safe_get_full_optimizer_state(parameter, name)
            for name, value in found.items():
                assert value.abs().sum() > 0
                if engine.zero_optimization_stage() > 0:
                    assert torch.equal(value, expected[name].float()), (state.name(parameter), name)


def _write_masters_and_refresh(kind: str) -> None:
    """Scaling every master by 1/2 must change the logits at once, on all ranks alike, and last."""
    with engine_of(kind) as engine:
        state = ShardedState(engine)
        train(engine, 0)
        before = logits(engine)
        for parameter in state.parameters():
            master = state.master(parameter)
            if master is not None:
                master.mul_(0.5)
        state.refresh_weights()
        after = logits(engine)
        assert not torch.equal(before, after)
        same = [None] * dist.get_world_size()
        dist.all_gather_object(same, after)
        assert all(torch.equal(after, other) for other in same)
        norm = engine.module.norm.weight
        import deepspeed

        if hasattr(norm, "ds_id"):
            with deepspeed.zero.GatheredParameters([norm]):
                value = norm.detach().float().clone()
        else:
            value = norm.detach().float()
        assert float((value - 0.5).abs().max()) < 0.02  # the norm's weight was near 1
        train(engine, 1)  # the next update starts from the written masters
        masters = _whole(state, norm, state.master(norm))
        assert float((masters - 0.5).abs().max()) < 0.02


def _counters(kind: str) -> list[list[int]]:
    with engine_of(kind) as engine:
        state = ShardedState(engine)
        for update in range(3):
            train(engine, update)
        first, *others = state.groups()
        history = [sorted(set(state.step_counters(first)))]
        state.set_step_counters(first, 0)
        history.append(sorted(set(state.step_counters(first))))
        history.append(sorted({c for g in others for c in state.step_counters(g)}))
        train(engine, 3)
        history.append(sorted(set(state.step_counters(first))))
        return history


def _all_checks(kind: str) -> list[list[int]]:
    _compare_with_deepspeed(kind)
    _write_masters_and_refresh(kind)
    return _counters(kind)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_fragments_equal_deepspeeds_api_and_written_masters_take_effect(
    kind: str, world_size: int
) -> None:
    if world_size == 1 and kind not in ("fp32 stage 0", "bf16 stage 1", "bf16 stage 3"):
        pytest.skip("one rank: three kinds are enough")
    results = run_distributed(_all_checks, world_size, kind)
    # At stage 0 DeepSpeed makes a step with zero gradients when it builds the bf16 wrapper.
    made = 4 if kind == "bf16 stage 0" else 3
    assert all(result == [[made], [0], [made], [1]] for result in results)


def _round_robin() -> None:
    with engine_of("fp32 stage 2") as engine:
        engine.optimizer.round_robin_gradients = True
        ShardedState(engine)


def test_a_layout_that_cannot_be_read_is_refused() -> None:
    (message,) = run_distributed(message_of, 1, _round_robin)
    assert message.startswith("UserError: ") and "round_robin_gradients" in message
