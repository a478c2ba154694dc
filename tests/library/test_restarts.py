"""Restarts of plain loops against float64 algebra, new optimizers, and runs without a break."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megalr
from megalr.config.restarts import RestartsConfig
from megalr.library.pairs import factor_pairs
from megalr.restarts.schedule import RestartSchedule
from tests.hf.models import FAMILIES, lively
from tests.hf.test_factorized import METHODS, load, sample, write
from tests.library.models import batch, loss_of, net
from tests.library.parallel import by_kind

TARGETS = ["up", "down"]


def factorized(density: float | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    return megalr.factorize_(
        net(dtype), rank=3, targets=TARGETS, density=density, alpha=8.0, init="kaiming"
    )


def muon_of_megalr(model: nn.Module) -> torch.optim.Optimizer:
    matrices, others = megalr.split_parameters(model, targets=TARGETS)
    return megalr.optim.Muon(
        [{"params": matrices, "use_muon": True}, {"params": others}], lr=1e-2, ns_method="standard"
    )


def galore(model: nn.Module) -> torch.optim.Optimizer:
    matrices, others = megalr.split_parameters(model, targets=TARGETS)
    return megalr.optim.GaLore(
        [{"params": matrices, "rank": 2, "update_proj_gap": 3}, {"params": others}], lr=1e-2
    )


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "fused adamw, amsgrad": lambda m: torch.optim.AdamW(
        m.parameters(), lr=1e-2, amsgrad=True, fused=True
    ),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "spam": lambda m: megalr.optim.SPAM(m.parameters(), lr=1e-2, update_gap=0, threshold=50.0),
    "stable_spam": lambda m: megalr.optim.StableSPAM(m.parameters(), lr=1e-2, total_T=50),
    "galore": galore,
    "loro": lambda m: megalr.optim.LORO(m.parameters(), lr=1e-2, hidden_size=12, exact_every=3),
    "muon": muon_of_megalr,
    "scale": lambda m: megalr.optim.SCALE(by_kind(m), lr=1e-2),
}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(index)).backward()
    optimizer.step()


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """First and second moments, wherever the optimizer keeps them."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
    stores: list[dict[str, Any]] = []
    for state in optimizer.state.values():
        stores += [state, *state.get("matrices", {}).values()]
    return [store[name] for store in stores for name in names if name in store]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restart_balances_the_factors_zeroes_the_moments_and_changes_no_output(kind: str) -> None:
    model = factorized()
    optimizer = OPTIMIZERS[kind](model)
    restarts = megalr.Restarts(model, optimizer, every=4)
    for index in range(3):
        update(model, optimizer, index)
        assert restarts.step() is None
    update(model, optimizer, 3)
    before = model(batch(9))
    assert all(moment.any() for moment in moments(optimizer))
    report = restarts.step()
    assert report.refactorized and report.reset and report.matrices == 4
    assert report.fraction_reset == 1.0 and report.update == 4
    assert torch.allclose(model(batch(9)), before, atol=1e-12)
    for layer in megalr.factorized_layers(model).values():
        # float64: the balanced factors of the product have its singular values as Gram matrices.
        singular = torch.linalg.svdvals(layer.b @ layer.a)[:3].diag()
        assert torch.allclose(layer.b.T @ layer.b, singular, atol=1e-9)
        assert torch.allclose(layer.a @ layer.a.T, singular, atol=1e-9)
    assert moments(optimizer) and not any(moment.any() for moment in moments(optimizer))


def test_after_a_restart_adamw_continues_like_a_new_one() -> None:
    model = factorized()
    optimizer = OPTIMIZERS["adamw"](model)
    restarts = megalr.Restarts(model, optimizer, every=3)
    for index in range(3):
        update(model, optimizer, index)
        restarts.step()
    twin = copy.deepcopy(model)
    fresh = OPTIMIZERS["adamw"](twin)
    for index in range(3, 5):
        update(model, optimizer, index)
        restarts.step()
        update(twin, fresh, index)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_moments_are_carried_into_the_new_factors_when_asked() -> None:
    model = factorized(density=0.2)
    factors = [p for name, p in model.named_parameters() if name.endswith((".a", ".b"))]
    ids = {id(p) for p in factors}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": factors, "betas": (0.8, 0.99)}], lr=1e-2
    )
    restarts = megalr.Restarts(model, optimizer, every=3, reset="transport")
    for index in range(2):
        update(model, optimizer, index)
        assert restarts.step() is None
    update(model, optimizer, 2)
    before = {
        p: (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in model.parameters()
    }
    report = restarts.step()
    assert report.moments_transported and not report.reset
    for layer in megalr.factorized_layers(model).values():
        (b, b_state), (a, a_state) = before[layer.b], before[layer.a]
        inverse = (1 / torch.linalg.svdvals(layer.b @ layer.a)[:3]).detach()
        with torch.no_grad():  # T = AA'ᵀ S⁻¹ and T⁻¹ = S⁻¹ B'ᵀB
            t, t_inverse = a @ layer.a.T * inverse, inverse[:, None] * (layer.b.T @ b)
        assert torch.allclose(t @ t_inverse, torch.eye(3, dtype=t.dtype), atol=1e-9)
        new_b, new_a = optimizer.state[layer.b], optimizer.state[layer.a]
        assert torch.allclose(new_b["exp_avg"], b_state["exp_avg"] @ t_inverse.T, atol=1e-12)
        assert torch.allclose(new_a["exp_avg"], t.T @ a_state["exp_avg"], atol=1e-12)
        assert new_b["step"] == 3 and not torch.allclose(new_b["exp_avg_sq"], b_state["exp_avg_sq"])
    for p in others:
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], before[p][1]["exp_avg_sq"])


def test_only_the_factors_are_reset_when_asked_and_the_counter_can_stay() -> None:
    model = factorized(density=0.2)
    optimizer = OPTIMIZERS["adamw"](model)
    restarts = megalr.Restarts(
        model, optimizer, reset_every=2, reset_scope="factors", reset_counter="keep",
        reset_moments=["first"],
    )  # fmt: skip
    for index in range(2):
        update(model, optimizer, index)
        report = restarts.step()
    assert not report.refactorized and report.moments_reset == ("first",)
    for name, parameter in model.named_parameters():
        state, is_factor = optimizer.state[parameter], name.endswith((".a", ".b"))
        assert bool(state["exp_avg"].any()) != is_factor
        assert state["exp_avg_sq"].any() and state["step"] == 2


def imbalances(model: nn.Module) -> list[float]:
    """||B'B - AA'|| / (||B'B|| + ||AA'||) of every layer."""
    grams = [
        (layer.b.detach().T @ layer.b.detach(), layer.a.detach() @ layer.a.detach().T)
        for layer in megalr.factorized_layers(model).values()
    ]
    return [float((b - a).norm() / (b.norm() + a.norm())) for b, a in grams]


def test_the_imbalance_restarts_where_it_exceeds_the_threshold_and_only_there() -> None:
    model, threshold = factorized(), 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    restarts = megalr.Restarts(
        model, optimizer, imbalance_threshold=threshold, imbalance_every=3, start_after=3,
        lr_recovery="linear", recovery_updates=1,
    )  # fmt: skip
    happened = []
    for index in range(24):
        update(model, optimizer, index)
        done, worst = index + 1, max(imbalances(model))
        report = restarts.step()
        expected = done % 3 == 0 and done > 3 and worst > threshold
        assert (report is not None) == expected, (done, worst)
        happened.append(expected)
        assert restarts.learning_rate_factor() == (0.5 if expected else 1.0)
        if report is not None:
            assert report.trigger == "imbalance" and report.imbalance == pytest.approx(worst)
            assert report.refactorized and report.fraction_reset == 1.0
            assert max(imbalances(model)) < 1e-9
    assert 0 < sum(happened) < 7


@pytest.mark.parametrize("recovery", ["linear", "cosine"])
def test_recovery_multiplies_what_a_scheduler_sets_for_the_update_only(recovery: str) -> None:
    model = factorized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # reads group["lr"]
    restarts = megalr.Restarts(
        model, optimizer, reset_every=4, lr_recovery=recovery, recovery_updates=2
    )
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    for index in range(9):
        update(model, optimizer, index)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**index)
        restarts.step()
        scheduler.step()
    ramp = {"linear": (1 / 3, 2 / 3), "cosine": (0.25, 0.75)}[recovery]
    factors = [1, 1, 1, 1, *ramp, 1, 1, ramp[0]]
    assert seen == pytest.approx([0.1 * 0.9**i * f for i, f in enumerate(factors)])
    settings = {"reset_every": 4, "lr_recovery": recovery, "recovery_updates": 2}
    run = RestartSchedule(RestartsConfig(**settings), 9, lambda t: 1.0)
    assert factors == pytest.approx([run.learning_rate_factor(t) for t in range(9)])


@pytest.mark.parametrize(
    ("kind", "when"),
    [*((kind, {"every": 4}) for kind in OPTIMIZERS),
     ("adamw", {"imbalance_threshold": 0.01, "imbalance_every": 4})],
)  # fmt: skip
def test_a_run_that_is_stopped_and_resumed_is_the_unbroken_one_bit_for_bit(
    kind: str, when: dict[str, Any]
) -> None:
    def start():
        model = factorized(dtype=torch.float32)
        optimizer = OPTIMIZERS[kind](model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
        restarts = megalr.Restarts(
            model, optimizer, **when, lr_recovery="linear", recovery_updates=3
        )
        return model, optimizer, scheduler, restarts

    def run(parts, first: int, last: int) -> None:
        model, optimizer, scheduler, restarts = parts
        for index in range(first, last):
            update(model, optimizer, index)
            restarts.step()
            scheduler.step()

    unbroken = start()
    run(unbroken, 0, 10)
    stopped = start()
    run(stopped, 0, 5)  # in the middle of a recovery
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    resumed = start()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(resumed, 5, 10)
    pairs = zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert resumed[3].state_dict() == unbroken[3].state_dict()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")
def test_pairs_of_another_optimizer_are_not_touched() -> None:
    """torch's Muon takes matrices only, so a second optimizer has the rest."""
    model = factorized()
    matrices, others = megalr.split_parameters(model, targets=TARGETS)
    muon = torch.optim.Muon(matrices, lr=1e-2)
    adamw = torch.optim.AdamW(others, lr=1e-2)
    restarts = megalr.Restarts(model, muon, every=2)
    resets = megalr.Restarts(model, adamw, reset_every=2)
    for index in range(2):
        update(model, muon, index)
        adamw.step()
        reports = restarts.step(), resets.step()
    assert reports[0].refactorized and reports[0].reset and not reports[1].refactorized
    assert not any(moment.any() for moment in [*moments(muon), *moments(adamw)])


def test_factors_that_are_not_finite_are_left_alone_and_named() -> None:
    model = factorized()
    optimizer = OPTIMIZERS["adamw"](model)
    restarts = megalr.Restarts(model, optimizer, every=1)
    update(model, optimizer, 0)
    with torch.no_grad():
        model.blocks[1].up.a[0, 0] = float("nan")
    report = restarts.step()
    assert report.skipped_nonfinite == ("blocks.1.up.a",) and not report.reset
    assert all(moment.any() for moment in moments(optimizer))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def _early() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = _adamw(model)
    return megalr.factorize_(model, rank=3, targets=TARGETS), optimizer


def _pair(make=_adamw, model=factorized):
    def both():
        built = model()
        return built, make(built)

    return both


REFUSALS = {
    "an optimizer that is too old": (
        _early, {"every": 2}, r"4 of the \d+ parameters of AdamW are not in the model.*before",
    ),
    "of another model": (
        lambda: (factorized(), _adamw(net())), {"every": 2}, r"are not in the model",
    ),
    "no factors": (_pair(model=net), {"every": 2}, r"no factorized layers: call factorize_ first"),
    "factors that are not trained": (
        _pair(lambda m: torch.optim.AdamW(m.embedding.parameters())), {"every": 2},
        r"no factors among the parameters of AdamW",
    ),
    "no factors to reset": (
        _pair(model=net), {"reset_every": 2, "reset_scope": "factors"}, r"has no factors",
    ),
    "no moments": (
        _pair(lambda m: torch.optim.SGD(m.parameters())), {"every": 2},
        r"SGD has no first or second moments to reset: use refactorize_every",
    ),
    "moments of another optimizer": (
        _pair(lambda m: torch.optim.SGD(m.parameters(), momentum=0.9)),
        {"every": 2, "reset": "transport"}, r"carries the moments of AdamW .*, and SGD keeps",
    ),
    "a scope of runs": (
        _pair(), {"every": 2, "reset_scope": "layers"}, r'use "all" or "factors"',
    ),
    "nothing to do": (_pair(), {}, r"nothing to do"),
    "a period of zero": (_pair(), {"every": 0}, r"every = 0: must be greater than or equal to 1"),
    "a phase beyond the period": (_pair(), {"every": 2, "phase": 3}, r"phase 3 must be smaller"),
    "an end without a length": (_pair(), {"every": 2, "stop_before": 5}, r"give total_updates"),
    "an unknown recovery": (_pair(), {"every": 2, "lr_recovery": "quadratic"}, r"lr_recovery"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line(case: str) -> None:
    make, options, message = REFUSALS[case]
    model, optimizer = make()
    with pytest.raises(megalr.UserError, match=message) as caught:
        megalr.Restarts(model, optimizer, **options)
    assert "\n" not in str(caught.value)


def test_moments_of_an_unknown_name_are_an_error_unless_the_optimizer_names_them() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["average"] = state.pop("momentum_buffer")

    model = factorized()
    optimizer = Odd(model.parameters(), lr=1e-2, momentum=0.9)
    restarts = megalr.Restarts(model, optimizer, reset_every=1)
    update(model, optimizer, 0)
    with pytest.raises(megalr.UserError, match="Odd has no state named exp_avg, momentum_buffer"):
        restarts.step()
    optimizer.moment_names = {"first": ("average",)}
    assert restarts.step().fraction_reset == 1.0


@pytest.mark.parametrize("family, method", [("llama", "low_rank"), ("gpt2", "sltrain")])
def test_a_folder_exported_in_factorized_form_can_be_trained_on_with_restarts(
    family: str, method: str, tmp_path: Path
) -> None:
    """Its q, k, v share one matrix A; GPT-2's are one layer of three pairs."""
    decoder = lively(METHODS[method], **FAMILIES[family][0])
    model = load(write(decoder, tmp_path / "out")).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    restarts = megalr.Restarts(model, optimizer, every=1)
    ids = sample(2, 9)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    before = model(ids).logits.detach()
    pairs = factor_pairs(model)
    assert len(pairs) == len(decoder.factor_pairs())
    report = restarts.step()
    assert report.matrices == len(pairs) and report.fraction_reset == 1.0
    assert torch.allclose(model(ids).logits, before, atol=1e-9)
    for pair in pairs:
        a, b = pair.a[slice(*pair.a_rows)], pair.b
        assert torch.allclose(b.T @ b, a @ a.T, atol=1e-9)
