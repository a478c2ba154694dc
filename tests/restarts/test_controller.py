"""What the training loop sees: refusals at the start, triggers, skipped restarts, reports."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state

from megalr.config.restarts import RestartsConfig
from megalr.engine.state import EngineState
from megalr.optim.groups import parameter_groups
from megalr.restarts.controller import Restarts
from megalr.restarts.report import by_pattern
from megalr.restarts.spikes import SpikeDetector
from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, message_of, train


def _restarts(engine, total: int = 100, **settings) -> Restarts:
    config = RestartsConfig(**settings)
    return Restarts(config, engine, engine.module.factor_pairs(), total, lambda t: 1.0)


def _sgd(decoder):
    return torch.optim.SGD(decoder.parameters(), lr=0.1)


def _one_group(decoder):
    return torch.optim.AdamW(decoder.parameters(), lr=1e-3)


def _make(method: str, optimizer, settings: dict, attribute: tuple | None = None) -> None:
    with engine_of("fp32 stage 2", method, optimizer) as engine:
        if attribute is not None:
            setattr(engine.optimizer, *attribute)
        _restarts(engine, **settings)


@pytest.mark.parametrize(
    ("method", "optimizer", "settings", "message"),
    [
        (
            "full_rank",
            None,
            {"every": 200},
            r"restarts\.every = 200 .* no factors: use restarts\.reset_every",
        ),
        (
            "full_rank",
            None,
            {"refactorize_every": 7},
            r"restarts\.refactorize_every = 7 .* no factors",
        ),
        (
            "full_rank",
            None,
            {"imbalance_threshold": 0.5},
            r"imbalance_threshold = 0\.5 .* no factors",
        ),
        ("full_rank", None, {"reset_every": 5, "reset_scope": "factors"}, "use all or layers"),
        (
            "low_rank",
            _sgd,
            {"every": 5},
            r"reset_moments = first, second: the optimizer SGD has no",
        ),
        ("low_rank", _one_group, {"every": 5, "reset_scope": "factors"}, "group of their own"),
        (
            "full_rank",
            None,
            {"reset_every": 5, "reset_scope": "layers"},
            "reset_scope = layers .* group 0 has 8 of them among 10",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(method, optimizer, settings, message) -> None:
    (got,) = run_distributed(message_of, 1, _make, method, optimizer, settings)
    assert re.match(r"UserError: .*" + message, got)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (("swap_optimizer", True), "nvme"),
        (("zenflow", True), "zenflow"),
        (("partial_offload", 0.5), "ratio 1.0"),
    ],
)
def test_engines_whose_state_cannot_be_reached_are_refused(attribute, message) -> None:
    (got,) = run_distributed(message_of, 1, _make, "low_rank", None, {"every": 5}, attribute)
    assert re.match(r"UserError: restarts .*" + message, got)


def test_what_can_work_is_accepted() -> None:
    run_distributed(_make, 1, "full_rank", None, {"reset_every": 5})
    run_distributed(_make, 1, "low_rank", _sgd, {"refactorize_every": 5})
    run_distributed(_make, 1, "low_rank", _one_group, {"every": 5})
    run_distributed(_make, 1, "low_rank", _sgd, {})


def _independent_periods(kind: str) -> list:
    with engine_of(kind) as engine:
        restarts = _restarts(engine, refactorize_every=2, reset_every=3, reset_scope="factors")
        reports = []
        for update in range(6):
            train(engine, update)
            reports.append(restarts.after_update(update + 1))
        assert restarts.seconds > 0
        happened = [None if r is None else (r.refactorized, r.reset) for r in reports]
        return [happened, reports[-1].metrics()]


def test_refactorization_and_reset_keep_their_own_periods_and_report_what_they_did() -> None:
    for happened, metrics in run_distributed(_independent_periods, 2, "bf16 stage 2"):
        assert happened == [None, (True, False), (False, True), (True, False), None, (True, True)]
        assert metrics["trigger"] == "period" and metrics["matrices"] == 14
        assert metrics["refactorize_seconds"] > 0 and metrics["reset_seconds"] > 0
        assert 0.5 < metrics["fraction_reset"] < 0.9
        assert metrics["moments_reset"] == "first, second"
        assert metrics["parameters_reset"].startswith("layers.*.attention.qkv.b x2, layers.*.")
        assert metrics["dead_directions"] == 0 and "skipped_nonfinite" not in metrics


def _outer_apart(decoder):
    return torch.optim.AdamW(
        parameter_groups(decoder, decoder.factor_parameters(), 0.0, apart=("embedding", "head"))
    )


def _layers_only(kind: str, method: str) -> tuple[float, float]:
    with engine_of(kind, method, _outer_apart) as engine:
        restarts = _restarts(engine, reset_every=2, reset_scope="layers")
        for update in range(2):
            train(engine, update)
        report = restarts.after_update(2)
        state = EngineState(engine)
        zeroed = total = 0
        for parameter in state.parameters():
            outer = state.name(parameter) in ("embedding.weight", "head.weight")
            total += state.numel(parameter)
            zeroed += 0 if outer else state.numel(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, moment)
                assert bool(value.any()) == outer, state.name(parameter)
            counters = set(state.step_counters([parameter]))  # none where others hold it
            assert counters <= {2 if outer else 0}, state.name(parameter)
        return report.fraction_reset, zeroed / total


@pytest.mark.parametrize("method", ["full_rank", pytest.param("low_rank", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "kind", ["bf16 stage 2", pytest.param("fp32 stage 3", marks=pytest.mark.long)]
)
def test_the_scope_layers_spares_embedding_and_head(kind: str, method: str) -> None:
    for fraction, expected in run_distributed(_layers_only, 2, kind, method):
        assert fraction == pytest.approx(expected, abs=1e-12) and 0.3 < fraction < 1


def _nonfinite(kind: str) -> tuple:
    with engine_of(kind) as engine:
        restarts = _restarts(engine, every=1)
        train(engine, 0)
        state = restarts._state
        first = state.master(engine.module.factor_pairs()[0].a)
        if dist.get_rank() == 0 and first is not None:
            first[0] = math.nan
        moments = [v.clone() for p in state.parameters() for v in state.states(p).values()]
        masters = [m.clone() for p in state.parameters() if (m := state.master(p)) is not None]
        report = restarts.after_update(1)
        again = [v for p in state.parameters() for v in state.states(p).values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, again, strict=True))
        again = [m for p in state.parameters() if (m := state.master(p)) is not None]
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7))
            for a, b in zip(masters, again, strict=True)
        )
        return report.refactorized, report.reset, report.skipped_nonfinite, report.metrics()


def test_nonfinite_factors_skip_the_whole_restart_and_are_named_on_every_rank() -> None:
    for refactorized, reset, names, metrics in run_distributed(_nonfinite, 2, "fp32 stage 2"):
        assert not refactorized and not reset
        assert names == ("layers.0.attention.qkv.a",)
        assert metrics["skipped_nonfinite"] == "layers.*.attention.qkv.a"


def _imbalance(kind: str) -> list:
    """The factors drift apart at update 5 of a run without periods."""
    with engine_of(kind) as engine:
        restarts = _restarts(
            engine,
            imbalance_threshold=0.3,
            imbalance_every=2,
            lr_recovery="linear",
            recovery_updates=3,
            start_after=2,
        )
        state, happened = restarts._state, []
        for update in range(8):
            train(engine, update)
            if update == 4:
                for pair in engine.module.factor_pairs()[:1]:
                    for parameter, factor in ((pair.b, 4.0), (pair.a, 0.25)):
                        if (master := state.master(parameter)) is not None:
                            master.mul_(factor)
                state.refresh_weights()
            report = restarts.after_update(update + 1)
            if report is not None:
                happened.append((report.update, report.trigger, report.refactorized, report.reset))
                assert report.imbalance > 0.3 and report.metrics()["imbalance"] > 0.3
        return [happened, [restarts.learning_rate_factor(t) for t in range(6, 10)]]


def test_imbalanced_factors_trigger_a_restart_with_recovery_on_all_ranks_alike() -> None:
    for kind in ("fp32 stage 0", "bf16 stage 3"):
        for happened, factors in run_distributed(_imbalance, 2, kind):
            # At update 2 the window is not open; at 4 the fresh factors are found imbalanced.
            assert happened == [(4, "imbalance", True, True), (6, "imbalance", True, True)]
            assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def _spike(kind: str) -> list:
    with engine_of(kind) as engine:
        restarts = _restarts(engine, gradient_norm_spike=3.0, spike_window=6)
        happened = []
        for update in range(14):
            train(engine, update)
            norm = 1.0 + 0.1 * (update % 3)
            if update == 2 or (update >= 8 and dist.get_rank() == 1):
                norm = 10.0  # one rank alone sees it from update 9 on
            report = restarts.after_update(update + 1, torch.tensor(norm))
            if report is not None:
                happened.append((report.update, report.trigger, report.refactorized, report.reset))
        with pytest.raises(ValueError, match="needs the gradient norm"):
            restarts.after_update(15)
        return happened


def test_a_gradient_norm_spike_resets_once_on_all_ranks_even_if_one_alone_saw_it() -> None:
    expected = [(9, "gradient_norm", False, True)]
    assert run_distributed(_spike, 2, "fp32 stage 1") == [expected, expected]


def test_the_spike_detector_follows_its_definition_and_resumes() -> None:
    detector = SpikeDetector(ratio=2.0, window=4)
    norms = [1.0, 9.0, 1.0, 1.5, 2.9, 1.0, math.nan, math.inf, 50.0, 50.0, 1.0, 1.0, 1.0, 1.0, 9.0]
    copy = SpikeDetector(2.0, 4)
    seen = []
    for update, norm in enumerate(norms, 1):
        seen.append(detector.observe(update, norm))
        assert copy.observe(update, norm) == seen[-1]
        copy = SpikeDetector(2.0, 4)
        copy.load_state_dict(detector.state_dict())
    # update 2: too little history; 5: 2.9 > 2 x median(1, 9, 1, 1.5) = 2.5; 6 to 8: quiet
    assert [u for u, s in enumerate(seen, 1) if s] == [5, 9, 15]


def test_reports_name_parameters_by_pattern() -> None:
    assert by_pattern(["layers.0.a", "layers.11.a", "head"]) == "layers.*.a x2, head"
