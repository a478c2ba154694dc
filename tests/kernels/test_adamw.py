"""AdamW by the kernel equals torch's fused AdamW and float64 (on the CPU by Triton's interpreter).

Tolerance: the distance of bf16 numbers is at most 2^-7 of their size, and Triton's interpreter
truncates float32 to bf16 where a GPU rounds to nearest. So every step is compared alone, from the
same bf16 numbers, and may be one such distance off; on a GPU half of it from float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.config.optimizers import AdamWOptimizer
from megalr.engine.skip_step import step_or_skip
from megalr.kernels.adamw import AdamW
from megalr.optim.methods import RunFacts, build_optimizer
from tests.kernels.where import DEVICE, needs_triton

ONE_APART = 2.0**-7
ROUNDING = 2.0**-8 if DEVICE == "cuda" else ONE_APART
SHAPES = [(1,), (7,), (4096 + 3,), (64, 96), (5, 4096), (3, 5, 7)]
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
Parameters = list[torch.nn.Parameter]


def _parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
    device: str = DEVICE,
) -> Parameters:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]


def _new_gradients(parameters: Parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.empty_like(p)  # torch requires the strides of p
        p.grad.copy_(torch.randn(p.shape, generator=generator))


def _stepped(options: dict[str, Any] | None = None) -> tuple[AdamW, Parameters]:
    """An optimizer after its first update, which torch makes, with gradients of the next."""
    parameters = _parameters()
    optimizer = AdamW(parameters, **(options or OPTIONS))
    _new_gradients(parameters, 1)
    optimizer.step()
    assert not optimizer._tables
    _new_gradients(parameters, 2)
    return optimizer, parameters


def _torch_copy(optimizer: AdamW, parameters: Parameters) -> tuple[torch.optim.AdamW, Parameters]:
    """torch's optimizer with copies of weights and gradients, and the state by ``state_dict``."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for its, p in zip(copies, parameters, strict=True):
        its.grad = p.grad.clone()
    reference = torch.optim.AdamW(copies, fused=True)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return reference, copies


def _not_called(norm: torch.Tensor) -> None:
    """Clipping is the kernel's, not the caller's."""
    raise AssertionError("gradients were clipped outside the kernel")


def _numbers(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter) -> list[torch.Tensor]:
    """Copies of weight, moments and step."""
    state = optimizer.state[p]
    return [t.detach().clone() for t in (p, state["exp_avg"], state["exp_avg_sq"], state["step"])]


def _exact(
    group: dict[str, Any], numbers: list[torch.Tensor], grad: torch.Tensor, scale: float
) -> list[torch.Tensor]:
    """Weight, moments and step after an update in float64, where they are not rounded."""
    p, m, v, step = (t.double() for t in numbers)
    g = grad.double() / scale
    beta1, beta2 = group["betas"]
    step = step + 1
    p = p * (1 - group["lr"] * group["weight_decay"])
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + group["eps"]
    return [p - group["lr"] * m / (1 - beta1**step) / denominator, m, v, step]


def _check(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("scale", [None, 1.0, 3.7])
def test_steps_are_those_of_torch_and_of_float64(scale: float | None) -> None:
    """Odd sizes, steps that differ by tensor, decay, moved gradients, clipping in the kernel."""
    optimizer, parameters = _stepped()
    for p, step in zip(parameters, (1, 2, 10, 1000, 100_000, 0), strict=True):
        optimizer.state[p]["step"].fill_(step)
    group = optimizer.param_groups[0]
    given = None if scale is None else torch.tensor(scale, device=DEVICE)
    for update in range(3):
        reference, copies = _torch_copy(optimizer, parameters)
        for either in (optimizer, reference):
            either.grad_scale = given
            either.found_inf = None if scale is None else torch.zeros((), device=DEVICE)
        before = [_numbers(optimizer, p) for p in parameters]
        kept = [p.grad.clone() for p in parameters]
        optimizer.step()
        reference.step()
        assert optimizer._tables
        for p, its, old, grad in zip(parameters, copies, before, kept, strict=True):
            found = _numbers(optimizer, p)
            _check(found, _numbers(reference, its), ONE_APART)
            _check(found, _exact(group, old, grad, scale or 1.0), ROUNDING)
            assert found[3] == old[3] + 1
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)
        _new_gradients(parameters, 10 + update)
        group["lr"] *= 0.7


@needs_triton
def test_two_groups_with_options_of_their_own() -> None:
    """One without decay, as norms have, and a weight that got no gradient in the other."""
    parameters = _parameters()
    groups = [
        {"params": parameters[:3], "weight_decay": 0.0, "betas": (0.0, 0.95)},
        {"params": parameters[3:], "lr": 0.1},
    ]
    optimizer = AdamW(groups, **OPTIONS)
    _new_gradients(parameters, 1)
    optimizer.step()
    _new_gradients(parameters, 2)
    parameters[4].grad = None
    before = [_numbers(optimizer, p) for p in parameters]
    optimizer.step()
    assert len(optimizer._tables) == 2
    for index, (p, old) in enumerate(zip(parameters, before, strict=True)):
        group = optimizer.param_groups[index // 3]
        expected = old if p.grad is None else _exact(group, old, p.grad, 1.0)
        _check(_numbers(optimizer, p), expected, ROUNDING)


@needs_triton
def test_bias_corrections_in_full_precision() -> None:
    """1 - 0.999 keeps its digits."""
    from megalr.kernels.adamw_triton import make_tables, update_

    steps = torch.tensor([1.0, 2.0, 10.0, 1000.0, 100_000.0], dtype=torch.float64)
    counters = [torch.tensor(float(step) - 1, device=DEVICE) for step in steps]
    numbers = [torch.ones(8, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    addresses = [x.data_ptr() for counter in counters for x in (*numbers, counter)]
    tables = make_tables(addresses, [0] * len(counters), torch.device(DEVICE), None)
    update_(tables, OPTIONS, None, None)
    expected = torch.stack((1 - 0.9**steps, (1 - 0.999**steps).sqrt()), dim=1)
    # A GPU gets the logarithms of the betas in float32, 6e-8 off, and the results are rounded.
    torch.testing.assert_close(tables.corrections.double().cpu(), expected, rtol=2e-7, atol=0)
    assert [float(counter) for counter in counters] == steps.tolist()


@needs_triton
def test_nothing_changes_where_the_gradient_is_not_finite() -> None:
    """As the guard against bad updates asks for it; the next step is made again."""
    optimizer, parameters = _stepped()
    before = [_numbers(optimizer, p) for p in parameters]
    parameters[3].grad[5, 5] = torch.nan
    norm = torch.tensor(torch.nan, device=DEVICE)
    step_or_skip(optimizer, norm, 1.0, _not_called, optimizer.step)
    assert optimizer.skipped == 1.0 and not optimizer.overflow
    assert optimizer._tables
    for p, old in zip(parameters, before, strict=True):
        for found, expected in zip(_numbers(optimizer, p), old, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    _new_gradients(parameters, 3)
    norm = torch.tensor(4.0, device=DEVICE)
    step_or_skip(optimizer, norm, 2.0, _not_called, optimizer.step)
    for p, old in zip(parameters, before, strict=True):
        expected = _exact(optimizer.param_groups[0], old, p.grad, (4.0 + 1e-6) / 2)
        _check(_numbers(optimizer, p), expected, ROUNDING)


@needs_triton
def test_tables_are_made_again_only_for_tensors_that_moved() -> None:
    """Gradients in the same memory, new gradients, and moments replaced by a loaded state."""
    optimizer, parameters = _stepped()
    optimizer.step()
    first = optimizer._tables[0]
    for p in parameters:
        p.grad.mul_(0.5)
    optimizer.step()
    assert optimizer._tables[0] is first
    held = [p.grad for p in parameters]
    _new_gradients(parameters, 3)
    before = [_numbers(optimizer, p) for p in parameters]
    optimizer.step()
    second = optimizer._tables[0]
    assert second is not first and second.chunks is first.chunks and len(held) == len(parameters)
    for p, old in zip(parameters, before, strict=True):
        expected = _exact(optimizer.param_groups[0], old, p.grad, 1.0)
        _check(_numbers(optimizer, p), expected, ROUNDING)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer._tables
    before = [_numbers(optimizer, p) for p in parameters]
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        expected = _exact(optimizer.param_groups[0], old, p.grad, 1.0)
        _check(_numbers(optimizer, p), expected, ROUNDING)


@needs_triton
def test_moments_zeroed_in_place() -> None:
    """A momentum reset: the next step is a first one."""
    optimizer, parameters = _stepped()
    optimizer.step()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    before = [_numbers(optimizer, p) for p in parameters]
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        found = _numbers(optimizer, p)
        _check(found, _exact(optimizer.param_groups[0], old, p.grad, 1.0), ROUNDING)
        assert found[3] == 1


@needs_triton
@pytest.mark.parametrize("case", ["float32", "unaligned", "not contiguous", "tensor lr"])
def test_other_cases_are_torchs(case: str) -> None:
    """Bitwise: one tensor that the kernel does not take sends all to torch."""
    parameters = _parameters()
    if case == "float32":
        parameters[2] = torch.nn.Parameter(parameters[2].detach().float())
    elif case == "unaligned":
        parameters[2] = torch.nn.Parameter(parameters[2].detach()[1:])
    elif case == "not contiguous":
        parameters[3] = torch.nn.Parameter(parameters[3].detach().t())
    rate = torch.tensor(0.01, device=DEVICE) if case == "tensor lr" else 0.01
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = AdamW(parameters, **(OPTIONS | {"lr": rate}))
    reference = torch.optim.AdamW(copies, **(OPTIONS | {"lr": rate}), fused=True)
    for update in range(3):
        for either, tensors in ((optimizer, parameters), (reference, copies)):
            _new_gradients(tensors, update)
            either.step()
    assert not optimizer._tables
    for p, its in zip(parameters, copies, strict=True):
        for found, wanted in zip(_numbers(optimizer, p), _numbers(reference, its), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_without_triton_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, bitwise: bf16, a closure, a skipped step, hooks that run once."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    parameters, copies = _parameters(device="cpu"), _parameters(device="cpu")
    optimizer = AdamW(parameters, **OPTIONS)
    reference = torch.optim.AdamW(copies, **OPTIONS, fused=True)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["fused"]
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for update, bad in enumerate((0.0, 0.0, 1.0, 0.0)):
        for either, tensors in ((optimizer, parameters), (reference, copies)):
            _new_gradients(tensors, update)
            if either.state:
                norm = torch.tensor(float("nan") if bad else 4.0)
                step_or_skip(either, norm, 1.0, _not_called, either.step)
            else:
                assert either.step(lambda: 3.0) == 3.0
    assert len(calls) == 4 and not optimizer._tables
    for p, its in zip(parameters, copies, strict=True):
        for found, wanted in zip(_numbers(optimizer, p), _numbers(reference, its), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert optimizer.state[p]["step"] == 3
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


def test_hooks_run_once_by_either_step() -> None:
    """Also where a plain AdamW was made before, whose class torch then puts hooks around."""
    parameters = _parameters()
    torch.optim.AdamW(parameters, fused=True)
    optimizer = AdamW(parameters, **OPTIONS)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for update in range(3):
        _new_gradients(parameters, update)
        optimizer.step()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("bf16_states", "kernels", "ours"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_runs_of_paper_bf16_take_it(bf16_states: bool, kernels: bool, ours: bool) -> None:
    """Unless ``train.kernels`` is torch; checkpoints record the same class name."""
    settings = AdamWOptimizer(lr=0.01, betas=(0.9, 0.95))
    facts = RunFacts(10, 8, 0, bf16_states=bf16_states, kernels=kernels)
    groups = [{"params": _parameters(device="cpu"), "weight_decay": 0.1}]
    made = build_optimizer(settings, SimpleNamespace(name="full_rank"), groups, facts)
    assert isinstance(made, torch.optim.AdamW) and isinstance(made, AdamW) is ours
    assert type(made).__name__ == "AdamW"
    group = made.param_groups[0]
    assert group["fused"] and group["lr"] == 0.0
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0.1
