"""megalr's optimizers against the engine's trajectories, torch's Muon and torch's contract."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import megalr
from tests.library.models import batch, loss_of
from tests.library.parallel import OPTIMIZERS, factorized
from tests.optim import engines
from tests.ranks import run_distributed

MEGALR = [kind for kind in OPTIMIZERS if kind not in ("adamw", "sgd")]


def gradients(model: nn.Module, index: int) -> torch.Tensor:
    model.zero_grad()
    loss = loss_of(model, batch(index))
    loss.backward()
    return loss


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_plain_loop_and_the_engine_without_zero_make_the_same_updates_bit_for_bit() -> None:
    methods = list(engines.METHODS)
    (found,) = run_distributed(engines.trajectories, 1, methods, [0], 2 * engines.GAP + 2, 1e9)
    assert found == {(method, 0): 0.0 for method in methods}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")
def test_muon_is_that_of_torch() -> None:
    """torch rounds to bf16 before it divides by the norm, so results differ by 1.4 % of the way."""
    torch.manual_seed(0)
    for shape in ((24, 12), (12, 24), (16, 16)):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
        muon = megalr.optim.Muon([ours], use_muon=True, ns_method="standard", **options)
        reference = torch.optim.Muon([theirs], **options)
        for _ in range(6):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            muon.step()
            reference.step()
        moved = float((theirs.detach() - 1).norm())
        assert float((ours - theirs).detach().norm()) < 0.03 * moved


@pytest.mark.parametrize("kind", MEGALR)
def test_state_dicts_closures_and_missing_gradients_behave_as_in_torch(kind: str) -> None:
    model = factorized()
    optimizer = OPTIMIZERS[kind](model)
    for index in range(4):
        gradients(model, index)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    again = OPTIMIZERS[kind](twin)
    again.load_state_dict(torch.load(file, weights_only=True))
    for index in range(4, 7):
        gradients(model, index)
        assert optimizer.step() is None
        loss = again.step(lambda index=index: gradients(twin, index))
        assert loss.requires_grad
    assert equal(model, twin)

    gradients(twin, 7)
    before = twin.embedding.weight.detach().clone()
    twin.embedding.weight.grad = None
    again.step()
    assert torch.equal(twin.embedding.weight, before) and not equal(model, twin)


@pytest.mark.parametrize("kind", MEGALR)
def test_a_scheduler_at_zero_stops_every_weight(kind: str) -> None:
    model = factorized()
    optimizer = OPTIMIZERS[kind](model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = copy.deepcopy(model)
    gradients(model, 0)
    optimizer.step()
    assert equal(model, before)


def test_a_group_that_is_added_late_is_an_optimizer_of_its_own_with_its_options() -> None:
    def run(together: bool) -> nn.Module:
        model = factorized()
        matrices, others = megalr.split_parameters(model, targets=["up", "down"])
        group = {"params": matrices, "rank": 2, "scale": 0.5, "weight_decay": 0.1}
        first = megalr.optim.GaLore([{"params": others}], lr=1e-2, update_proj_gap=2)
        optimizers = [first]
        for index in range(4):
            if index == 1 and together:
                first.add_param_group(group)
            elif index == 1:
                optimizers.append(megalr.optim.GaLore([group], lr=1e-2, update_proj_gap=2))
            gradients(model, index)
            for optimizer in optimizers:
                optimizer.step()
        return model

    assert equal(run(together=True), run(together=False))


REFUSALS = {
    "a rank for a vector": (lambda p, v: megalr.optim.GaLore([v], rank=2), r"is no matrix"),
    "a rank beyond a side": (lambda p, v: megalr.optim.Fira([p], rank=13), r"rank 13 is out of"),
    "an option out of range": (
        lambda p, v: megalr.optim.SPAM([p], threshold=-1.0), r"threshold must be >= 0, got -1.0",
    ),
    "a negative rate": (lambda p, v: megalr.optim.StableSPAM([p], lr=-1.0), r"lr must be >= 0"),
    "Muon of a vector": (lambda p, v: megalr.optim.Muon([v], use_muon=True), r"needs matrices"),
    "LORO without factors": (
        lambda p, v: megalr.optim.LORO([p], hidden_size=4), r"found no factors among its",
    ),
    "a transposed parameter": (
        lambda p, v: megalr.optim.SPAM([nn.Parameter(torch.ones(3, 4).T)]), r"not contiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line(case: str) -> None:
    make, message = REFUSALS[case]
    with pytest.raises(megalr.UserError, match=message) as caught:
        make(nn.Parameter(torch.ones(24, 12)), nn.Parameter(torch.ones(12)))
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_a_type_error_that_lists_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"unknown options: momentun; known: .*momentum"):
        megalr.optim.Muon([nn.Parameter(torch.ones(4, 4))], momentun=0.9)
