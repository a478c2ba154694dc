"""Stochastic rounding is unbiased, reproducible, and keeps bf16 moments moving."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megalr.engine.skip_step import step_or_skip
from megalr.kernels.adamw import AdamW
from megalr.kernels.stochastic_rounding import (
    StochasticRounding,
    keys_of,
    random_words,
    round_to_bf16,
)
from tests.kernels.test_adamw import (
    OPTIONS,
    _exact,
    _new_gradients,
    _not_called,
    _numbers,
    _parameters,
)
from tests.kernels.where import DEVICE, needs_triton

LARGEST = torch.finfo(torch.bfloat16).max
INF, NAN = float("inf"), float("nan")


def _noise(count: int, update: int = 1) -> torch.Tensor:
    return random_words(0, count, keys_of(7, update), "cpu")[0] & 0xFFFF


def _made(rounding: StochasticRounding | None, kernel: bool = False, **options: Any) -> AdamW:
    return AdamW(_parameters(), rounding=rounding, kernel=kernel, **(OPTIONS | options))


def _step(optimizer: AdamW, update: int) -> None:
    for group in optimizer.param_groups:
        group["update"] = update
    optimizer.step()


@pytest.mark.parametrize("value", [1.001, -3.14159, 1e-30, 2.5e-39, -7.7e20, 1 / 3, 65535.0])
def test_the_mean_of_many_draws_is_the_number_itself(value: float) -> None:
    """Both neighbours occur, nothing else, with the frequency that makes the mean exact."""
    draws = 1 << 16
    numbers = torch.full((draws,), value, dtype=torch.float32)
    exact = float(numbers[0])
    lower = numbers[:1].view(torch.int32) & -0x10000
    down, up = (float(bits.view(torch.float32)) for bits in (lower, lower + 0x10000))
    found = torch.cat([round_to_bf16(numbers, _noise(draws, u)) for u in range(1, 9)]).double()
    assert set(found.tolist()) == {down, up}
    share = (exact - down) / (up - down)
    error = abs(up - down) * (share * (1 - share) / found.numel()) ** 0.5
    assert abs(float(found.mean()) - exact) < 4 * error


def test_what_bf16_holds_stays_and_nothing_becomes_infinite() -> None:
    noise = torch.full((1,), 0xFFFF, dtype=torch.int32)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_to_bf16(exact.float(), noise), exact)
    many = torch.randn(100_000)
    many[:64] = torch.tensor([0x3F808000 + 0x10000 * i for i in range(64)]).int().view(many.dtype)
    assert torch.equal(round_to_bf16(many, None), many.bfloat16())
    special = torch.tensor([0.0, -0.0, INF, -INF, 3.4e38, -3.4028234e38])
    found = round_to_bf16(special, noise).float()
    expected = torch.tensor([0.0, -0.0, INF, -INF, LARGEST, -LARGEST])
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_to_bf16(odd, noise).isnan().all()


def test_random_bits_belong_to_the_element_and_look_independent() -> None:
    """Any slice draws the same, also beyond 2^32; 48 bits balanced and uncorrelated."""
    keys, count = keys_of(7, 3), 1 << 16
    for first in (0, (1 << 32) - 100, 5 << 33):
        whole = torch.stack(random_words(first, 1000, keys, "cpu"))
        part = torch.stack(random_words(first + 91, 50, keys, "cpu"))
        assert torch.equal(whole[:, 91:141], part)
    places = [0, 1 << 32, 3 << 32]
    draws = [random_words(first, count, keys, "cpu") for first in places]
    draws += [random_words(0, count, keys_of(*other), "cpu") for other in ((7, 4), (8, 3))]
    rows = []
    for one, two in draws:
        numbers = (one & 0xFFFF, one >> 16 & 0xFFFF, two >> 16 & 0xFFFF)
        for number in numbers:
            seen = torch.bincount(number // 256, minlength=256).double()
            chi_squared = float(((seen - count / 256) ** 2 / (count / 256)).sum())
            assert chi_squared < 255 + 5 * 510**0.5
            bits = (number.unsqueeze(0) >> torch.arange(16).unsqueeze(1) & 1).double() - 0.5
            rows += [bits, bits.roll(1, dims=1)]
    # Each bit with each other, of the neighbouring element too, of other places, updates and seeds.
    correlation = torch.corrcoef(torch.cat(rows)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / count**0.5


@pytest.mark.parametrize("choice", ["none", "moments"])
def test_bf16_second_moments_stall_and_stochastic_ones_do_not(choice: str) -> None:
    """Gradients fall tenfold; with beta2 0.999 the mean of v should follow, as in float64."""
    rounding = None if choice == "none" else StochasticRounding(3, True, False)
    weight = torch.nn.Parameter(torch.zeros(2048, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=0.0, rounding=rounding, kernel=False)
    generator = torch.Generator().manual_seed(5)
    exact = torch.zeros(2048, dtype=torch.float64)
    for update in range(1, 3001):
        scale = 1.0 if update <= 1000 else 0.1
        gradient = (torch.randn(2048, generator=generator) * scale).bfloat16()
        weight.grad = gradient
        _step(optimizer, update) if rounding else optimizer.step()
        exact = 0.999 * exact + 0.001 * gradient.double().square()
        if update == 1000:
            peak = float(exact.mean())
    found = float(optimizer.state[weight]["exp_avg_sq"].double().mean())
    if choice == "none":
        assert found > 0.9 * peak > 6 * float(exact.mean())
    else:
        assert found == pytest.approx(float(exact.mean()), rel=0.01)


@pytest.mark.parametrize("moments, weights", [(True, False), (False, True), (True, True)])
def test_every_update_is_float64_rounded_to_a_neighbour(moments: bool, weights: bool) -> None:
    optimizer = _made(StochasticRounding(1, moments, weights))
    parameters = optimizer.param_groups[0]["params"]
    optimizer.grad_scale = torch.tensor(2.5, device=DEVICE)
    for update in range(1, 4):
        _new_gradients(parameters, update)
        zeros = [torch.zeros_like(p) for p in parameters]
        before = [
            _numbers(optimizer, p)
            if update > 1
            else [p.detach().clone(), z, z, torch.tensor(0.0, device=DEVICE)]
            for p, z in zip(parameters, zeros, strict=True)
        ]
        _step(optimizer, update)
        for p, old in zip(parameters, before, strict=True):
            expected = _exact(optimizer.param_groups[0], old, p.grad, 2.5)
            chosen = (weights, moments, moments, False)
            for got, wanted, stochastic in zip(
                _numbers(optimizer, p), expected, chosen, strict=True
            ):
                rtol = 2.0**-7 if stochastic else 2.0**-8
                torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=1e-6)


def test_weight_decay_below_half_a_distance_acts_on_average() -> None:
    """lr x decay = 1e-4 of 1 is lost by rounding to nearest and taken on average with weights."""
    means = []
    for choice in (StochasticRounding(1, True, False), StochasticRounding(1, True, True)):
        weight = torch.nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
        options = {"lr": 0.01, "weight_decay": 0.01}
        optimizer = AdamW([weight], **options, rounding=choice, kernel=False)
        for update in range(1, 101):
            weight.grad = torch.zeros_like(weight)
            _step(optimizer, update)
        means.append(float(weight.detach().double().mean()))
    assert means[0] == 1.0 and means[1] == pytest.approx(0.9999**100, abs=4e-4)


@needs_triton
@pytest.mark.parametrize("moments, weights", [(True, True), (True, False), (False, True)])
def test_the_kernel_gives_the_bits_of_the_reference(moments: bool, weights: bool) -> None:
    """Odd sizes, clipping, decay, a skipped update, numbers of elements beyond 2^32."""
    rounding = StochasticRounding(11, moments, weights)
    ours, reference = _made(rounding, kernel=True), _made(rounding)
    for optimizer in (ours, reference):
        first, runs = (1 << 32) - 3000, {}
        for p in optimizer.param_groups[0]["params"]:
            runs[p] = ((0, first, p.numel()),)
            first += p.numel()
        optimizer.attach_runs(runs)
    for update in range(1, 5):
        bad = update == 3
        for optimizer in (ours, reference):
            _new_gradients(optimizer.param_groups[0]["params"], update)
            for group in optimizer.param_groups:
                group["update"] = update
            norm = torch.tensor(NAN if bad else 4.0, device=DEVICE)
            if optimizer.state:
                step_or_skip(optimizer, norm, 2.0, _not_called, optimizer.step)
            else:
                optimizer.step()
        assert bool(ours._tables) and not reference._tables
        for p, its in zip(
            ours.param_groups[0]["params"], reference.param_groups[0]["params"], strict=True
        ):
            for got, wanted in zip(_numbers(ours, p), _numbers(reference, its), strict=True):
                assert torch.equal(got, wanted)


def test_a_skipped_update_changes_nothing() -> None:
    optimizer = _made(StochasticRounding(1, True, True))
    parameters = optimizer.param_groups[0]["params"]
    _new_gradients(parameters, 1)
    _step(optimizer, 1)
    before = [_numbers(optimizer, p) for p in parameters]
    parameters[3].grad[5, 5] = NAN
    optimizer.param_groups[0]["update"] = 2
    norm = torch.tensor(NAN, device=DEVICE)
    step_or_skip(optimizer, norm, 1.0, _not_called, optimizer.step)
    for p, old in zip(parameters, before, strict=True):
        for found, expected in zip(_numbers(optimizer, p), old, strict=True):
            assert torch.equal(found, expected)


def test_a_copy_rounds_alike_and_the_number_of_the_update_is_required() -> None:
    optimizer = _made(StochasticRounding(1, True, True))
    _new_gradients(optimizer.param_groups[0]["params"], 1)
    with pytest.raises(RuntimeError, match="the number of the update"):
        optimizer.step()
    other = copy.deepcopy(optimizer)
    _new_gradients(other.param_groups[0]["params"], 1)
    for either in (optimizer, other):
        _step(either, 1)
    for p, its in zip(
        optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(p, its)
