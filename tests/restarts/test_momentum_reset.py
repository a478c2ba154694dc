"""Momentum reset inside engines, read back through DeepSpeed's own API."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from megalr.engine.state import EngineState, attach_layouts
from megalr.optim.galore import GaLore
from megalr.optim.groups import parameter_groups
from megalr.optim.spam import SPAM
from megalr.restarts.momentum_reset import check_groups, reset_moments
from megalr.restarts.refactorize import factor_parameters
from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, message_of, train

MOMENTS = ("exp_avg", "exp_avg_sq")


def _read(state: EngineState) -> dict[tuple[str, str], torch.Tensor]:
    """Whole moments of every parameter: DeepSpeed's API, or the plain optimizer at stage 0."""
    from deepspeed.utils import safe_get_full_optimizer_state

    values = {}
    for parameter in state.parameters():
        for moment in MOMENTS:
            if state.replicated:
                value = state.states(parameter)[moment]
            else:
                value = safe_get_full_optimizer_state(parameter, moment)
            values[state.name(parameter), moment] = value.detach().clone()
    return values


def _reset_and_compare(state: EngineState, kinds: tuple[str, ...], scope: str) -> float:
    factors = factor_parameters(state.wrapper.engine.module.factor_pairs())
    chosen = factors if scope == "factors" else state.parameters()
    names = {state.name(p) for p in chosen}
    state.relink()
    before = _read(state)
    result = reset_moments(state, chosen, kinds, "zero")
    assert set(result.parameters) == names
    after = _read(state)
    zeroed = total = 0
    for (name, moment), old in before.items():
        new = after[name, moment]
        if name in names and ("first" if moment == "exp_avg" else "second") in kinds:
            assert torch.count_nonzero(new) == 0
            zeroed += new.numel()
        else:
            assert torch.equal(new, old) and torch.count_nonzero(old) > 0
        total += new.numel()
    assert result.fraction == pytest.approx(zeroed / total, abs=1e-12)
    return result.fraction


def _resets(kind: str, folder: str) -> list[float]:
    with engine_of(kind) as engine:
        state = EngineState(engine)
        factors = factor_parameters(engine.module.factor_pairs())
        fractions = [0.0]
        if kind != "bf16 stage 0":  # DeepSpeed itself makes the moments there
            early = reset_moments(state, factors)
            assert (early.elements, early.total, early.fraction) == (0, 0, 0.0)
        for update in range(2):
            train(engine, update)
        fractions.append(_reset_and_compare(state, ("first", "second"), "factors"))
        assert set(state.step_counters(factors)) == {0}
        for update in range(2, 4):
            train(engine, update)
        assert set(state.step_counters(factors)) == {2}
        others = [p for p in state.parameters() if id(p) not in {id(f) for f in factors}]
        assert set(state.step_counters(others)) <= {4, 5}  # 5: see the note on stage 0 with bf16

        engine.save_checkpoint(folder, tag="four")
        engine.load_checkpoint(folder, tag="four")  # in the same process
        fractions.append(_reset_and_compare(state, ("second",), "factors"))
        engine.load_checkpoint(folder, tag="four")
        train(engine, 4)
        fractions.append(_reset_and_compare(state, ("first", "second"), "all"))
    with engine_of(kind) as engine:  # a new engine, as after a restart of the job
        engine.load_checkpoint(folder, tag="four")
        state = EngineState(engine)
        assert set(state.step_counters(factor_parameters(engine.module.factor_pairs()))) == {2}
        fractions.append(_reset_and_compare(state, ("first",), "all"))
        assert train(engine, 4) > 0
    return fractions


@pytest.mark.parametrize(
    "kind",
    [
        "fp32 stage 0",
        "fp32 stage 1",
        "fp32 stage 2",
        "fp32 stage 3",
        "bf16 stage 0",
        "bf16 stage 1",
        "bf16 stage 2 offload",
        "bf16 stage 3 offload",
        "paper_bf16 stage 0",
        "paper_bf16 stage 1",
    ],
)
def test_chosen_moments_are_zero_others_untouched_at_every_moment_of_a_run(
    kind: str, tmp_path
) -> None:
    results = run_distributed(_resets, 3, kind, str(tmp_path))
    assert results[0] == results[1] == results[2]
    before_first, factors, factors_second, everything, all_first = results[0]
    assert before_first == 0.0 and everything == 1.0 and all_first == 0.5
    assert factors_second == factors / 2 and 0.5 < factors < 0.9


def _counter(kind: str, counter: str, scope: str) -> list:
    with engine_of(kind) as engine:
        state = EngineState(engine)
        for update in range(3):
            train(engine, update)
        factors = factor_parameters(engine.module.factor_pairs())
        chosen = factors if scope == "factors" else state.parameters()
        check_groups(state, chosen, counter, "factors")
        reset_moments(state, chosen, counter=counter)
        after = sorted(set(state.step_counters(factors)))
        train(engine, 3)
        return [after, sorted(set(state.step_counters(factors)))]


@pytest.mark.parametrize(("counter", "value"), [("keep", 3), ("zero", 0), ("one", 1)])
def test_the_step_counter_is_kept_zero_or_one_and_counts_on(counter: str, value: int) -> None:
    for kind in ("fp32 stage 0", "bf16 stage 2"):
        assert (
            run_distributed(_counter, 2, kind, counter, "factors") == [[[value], [value + 1]]] * 2
        )


def _one_group(decoder):
    return torch.optim.AdamW(decoder.parameters(), lr=1e-3)


def _shared_group(counter: str) -> None:
    with engine_of("fp32 stage 2", optimizer=_one_group) as engine:
        state = EngineState(engine)
        factors = factor_parameters(engine.module.factor_pairs())
        check_groups(state, factors, counter, "factors")


def test_a_counter_shared_with_other_parameters_is_refused_unless_it_is_kept() -> None:
    run_distributed(_shared_group, 1, "keep")
    (message,) = run_distributed(message_of, 1, _shared_group, "zero")
    assert message.startswith("UserError: restarts.reset_scope = factors with reset_counter = zero")
    assert "group 0 has 16 of them among" in message


def _optimizers(name: str) -> tuple:
    made = {
        "sgd": lambda d: torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9),
        "rmsprop": lambda d: torch.optim.RMSprop(d.parameters(), lr=1e-3),
        "adamax": lambda d: torch.optim.Adamax(d.parameters(), lr=1e-3),
        "plain sgd": lambda d: torch.optim.SGD(d.parameters(), lr=0.1),
    }[name]
    with engine_of("fp32 stage 1", optimizer=made) as engine:
        state = EngineState(engine)
        train(engine, 0)
        result = reset_moments(state, state.parameters())
        left = 0
        for parameter in state.parameters():
            for value in state.states(parameter).values():
                left += int(torch.count_nonzero(value))
        train(engine, 1)
        return result.total > 0, result.fraction, left, dist.get_rank()


def test_any_optimizer_with_moments_can_be_reset() -> None:
    for name in ("sgd", "rmsprop", "adamax"):
        for exists, fraction, left, _ in run_distributed(_optimizers, 2, name):
            assert exists and fraction == 1.0 and left == 0
    # One without moments has nothing to zero; the controller refuses it at the start.
    assert all(
        result[:3] == (False, 0.0, 0) for result in run_distributed(_optimizers, 2, "plain sgd")
    )


def _of_megalr(name: str) -> tuple:
    """Optimizers of this package keep whole-matrix states that DeepSpeed's API knows nothing of."""

    def make(decoder):
        factors = factor_parameters(decoder.factor_pairs())
        groups = parameter_groups(decoder, factors, 0.0)
        if name == "spam":
            return SPAM(groups, lr=1e-3)
        for group in groups:
            if group["name"] == "factors":
                group["rank"] = 3
        return GaLore(groups, lr=1e-3)

    with engine_of("fp32 stage 2", optimizer=make) as engine:
        attach_layouts(engine)
        state = EngineState(engine)
        factors = factor_parameters(engine.module.factor_pairs())
        check_groups(state, factors, "zero", "factors")
        early = reset_moments(state, factors).total
        for update in range(2):
            train(engine, update)
        some = reset_moments(state, factors).fraction
        counters = set(state.step_counters(factors))
        every = reset_moments(state, state.parameters(), ("first",)).fraction
        left = sum(
            int(torch.count_nonzero(matrix["exp_avg"]))
            for entry in state.entries(state.parameters())
            for _, matrix in state.base.tensor_states(entry)
        )
        train(engine, 2)
        return early, some, every, counters, left


def test_the_optimizers_of_this_package_reset_their_whole_matrix_moments_too() -> None:
    for name in ("spam", "galore"):
        for early, some, every, counters, left in run_distributed(_of_megalr, 2, name):
            assert early == 0 and left == 0 and every == 0.5
            assert counters == {0} and 0.3 < some < 0.9


def _wrong_kind() -> None:
    made = lambda d: torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    with engine_of("fp32 stage 1", optimizer=made) as engine:
        state = EngineState(engine)
        train(engine, 0)
        reset_moments(state, state.parameters(), kinds=("second",))


def test_a_reset_that_would_zero_nothing_is_an_error_not_a_silent_no_op() -> None:
    for message in run_distributed(message_of, 2, _wrong_kind):
        assert re.match(
            r"RuntimeError: .* found no second moments of \d+ parameters in SGD", message
        )
