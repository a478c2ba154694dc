"""Masters, moments and weights inside engines of every kind, against DeepSpeed's own API."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalr.engine.state import EngineState
from tests.ranks import run_distributed
from tests.restarts.engines import KINDS, engine_of, logits, message_of, on_ranks, train


def _whole(state: EngineState, parameter, fragment) -> torch.Tensor:
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


def _compare_with_deepspeed(state: EngineState) -> None:
    """Masters and moments put together from fragments, and read through DeepSpeed's own API."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for parameter in state.parameters():
        master = _whole(state, parameter, state.master(parameter))
        assert master.abs().sum() > 0
        if not state.replicated:
            assert torch.equal(master, safe_get_full_fp32_param(parameter).float())
        for name in ("exp_avg", "exp_avg_sq"):
            moment = _whole(state, parameter, state.states(parameter).get(name))
            assert moment.abs().sum() > 0
            if not state.replicated:
                expected = safe_get_full_optimizer_state(parameter, name)
                assert torch.equal(moment, expected.float()), (state.name(parameter), name)


def _halve_masters(engine, state: EngineState) -> None:
    """Halved masters must change the logits at once, on all ranks alike, and for good."""
    before, norm = logits(engine), engine.module.norm.weight
    for parameter in state.parameters():
        if (master := state.master(parameter)) is not None:
            master.mul_(0.5)
    state.refresh_weights()
    after = logits(engine)
    assert not torch.equal(before, after)
    same: list = [None] * dist.get_world_size()
    dist.all_gather_object(same, after)
    assert all(torch.equal(after, other) for other in same)
    for _ in range(2):  # the next update starts from the written masters
        value = _whole(state, norm, state.master(norm))
        assert float((value - 0.5).abs().max()) < 0.02  # the norm's weight was near 1
        train(engine, 9)


def _check(kind: str) -> list[list[int]]:
    """All of it in one engine; the counters of the factors' group along the way."""
    with engine_of(kind) as engine:
        state = EngineState(engine)
        names = {name for name, _ in engine.module.named_parameters()}
        assert {state.name(p) for p in state.parameters()} == names
        assert sum(map(len, state.groups())) == len(names)
        if not state.replicated:
            assert all(state.states(p) == {} for p in state.parameters())
        for update in range(2):
            train(engine, update)
        state.relink()
        _compare_with_deepspeed(state)
        factors, *others = state.groups()
        history = [state.step_counters(factors)]
        state.set_step_counters(factors, 0)
        history.append(state.step_counters(factors))
        history.append([c for group in others for c in state.step_counters(group)])
        _halve_masters(engine, state)
        history.append(state.step_counters(factors))
        return [sorted(set(counters)) for counters in history]


@pytest.mark.parametrize(
    ("world_size", "kind"), on_ranks(KINDS, ["fp32 stage 0", "bf16 stage 1", "bf16 stage 3"])
)
def test_fragments_equal_deepspeeds_api_and_written_masters_take_effect(
    world_size: int, kind: str
) -> None:
    results = run_distributed(_check, world_size, kind)
    # At stage 0 DeepSpeed makes a step with zero gradients when it builds the bf16 wrapper.
    made = 3 if kind == "bf16 stage 0" else 2
    assert all(result == [[made], [0], [made], [2]] for result in results)


def _round_robin() -> None:
    with engine_of("fp32 stage 2") as engine:
        engine.optimizer.round_robin_gradients = True
        EngineState(engine)


def test_a_layout_that_cannot_be_read_is_refused() -> None:
    (message,) = run_distributed(message_of, 1, _round_robin)
    assert message.startswith("UserError: ") and "round_robin_gradients" in message
