"""Stochastic rounding of float32 to bf16, and AdamW that stores its results so, in plain torch.

A float32 number x between the neighbouring bf16 numbers a < b becomes b with the probability
(x - a) / (b - a), else a: the expected result is x. So an average of bf16 moves by small amounts
that rounding to nearest would drop at every update (beta2 = 0.999 changes no bf16 number at all).
In bits: a bf16 number is the upper half of a float32 one; 16 random bits are added to the lower
half, which is then cut off.

The random bits are a function of (seed, update, number of the element), counted over all trained
parameters, and not of a generator's state: they are the same for any number of ranks, at every
ZeRO stage, and after a resume. The Triton kernel (kernels.adamw_triton) gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = tuple[int, int, int]
"""``(offset, first, count)``: elements [offset, offset + count) of a flat tensor have the numbers
first, first + 1, ... among all trained elements."""

PIECE = 1 << 22
"""Elements that are updated at a time, so that temporaries stay below 256 MiB."""

# murmur3's 32-bit finalizer (Appleby 2011, public domain) and 2^32 / golden ratio.
MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)
INCREMENT = 0x9E3779B9

_EXPONENT, _UPPER_HALF = 0x7F800000, -0x10000


@dataclass(frozen=True)
class StochasticRounding:
    """What AdamW rounds stochastically, and the seed of the run that the random bits follow from.

    Everything else is rounded to nearest.
    """

    seed: int
    moments: bool
    weights: bool


def keys_of(seed: int, update: int) -> tuple[int, int]:
    """Two signed 32-bit numbers that start the random bits of an update."""
    digest = hashlib.blake2b(f"{seed} {update}".encode(), digest_size=8).digest()
    return tuple(int.from_bytes(part, "big", signed=True) for part in (digest[:4], digest[4:]))  # type: ignore[return-value]


def log_of(beta: float) -> float:
    """log(beta) rounded to float32, as which it reaches a GPU's kernel."""
    return float(torch.tensor(beta, dtype=torch.float64).log().float())


def random_words(first: int, count: int, keys: tuple[int, int], device: Any) -> tuple[Tensor, ...]:
    """Two int32 tensors (count,) of 32 random bits for the elements first, first + 1, ...

    With x -> mix(x) the finalizer, all modulo 2^32, and low and high the halves of an element's
    number: one = mix(mix(low xor key 0) + high * INCREMENT + key 1), two = mix(one + INCREMENT).
    For one update and one ``high``, ``low`` -> ``one`` is a permutation.
    """
    number = torch.arange(first, first + count, dtype=torch.int64, device=device)
    high = (number >> 32).to(torch.int32)
    one = _mix(_low_half(number) ^ keys[0])
    one = _mix(one + high * _signed(INCREMENT) + keys[1])
    return one, _mix(one + _signed(INCREMENT))


def round_to_bf16(values: Tensor, noise: Tensor | None) -> Tensor:
    """float32 ``values`` to bf16 with 16 random bits of ``noise`` (int32, 0 to 65535).

    Unbiased between the largest bf16 numbers; beyond them a finite number becomes the largest.
    bf16 numbers, zeros with their sign, infinities and NaN stay. Without noise to the nearest, of
    equally near ones the even.
    """
    bits = values.view(torch.int32)
    if noise is None:
        noise = 0x7FFF + (bits >> 16 & 1)
    rounded = bits + noise
    carried = (rounded & _EXPONENT) == _EXPONENT  # into the bits of infinity
    rounded = torch.where(carried, bits, rounded) & _UPPER_HALF
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).to(torch.bfloat16)


@torch.no_grad()
def adamw_(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    group: dict[str, Any],
    rounding: StochasticRounding,
    runs: tuple[Run, ...],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One update of AdamW in float32, in the operations and the order of the Triton kernel.

    Args:
        tensors: weight, gradient and both moments in bf16, and the step, float32 of one element.
        group: options of the optimizer; ``update`` is the number of the update.
        rounding: what is rounded stochastically.
        runs: the numbers of the elements; elements in none of them stay.
        grad_scale: float32 scalar on the device; gradients are divided by it.
        found_inf: likewise; if it is 1 nothing changes.
    """
    weight, gradient, first, second, step = tensors
    constants = _constants(group, step, grad_scale)
    keep = None if found_inf is None else found_inf == 1.0
    step += 1.0 if found_inf is None else 1.0 - found_inf
    keys = keys_of(rounding.seed, group["update"])
    flat = [weight.view(-1), gradient.reshape(-1), first.view(-1), second.view(-1)]
    for offset, number, count in _pieces(runs):
        old = [tensor.narrow(0, offset, count) for tensor in flat]
        one, two = random_words(number, count, keys, weight.device)
        noise = (two >> 16 & 0xFFFF, one & 0xFFFF, one >> 16 & 0xFFFF)
        new = _updated(old, constants)
        chosen = (rounding.weights, rounding.moments, rounding.moments)
        for target, value, bits, stochastic in zip(
            (old[0], old[2], old[3]), new, noise, chosen, strict=True
        ):
            stored = round_to_bf16(value, bits if stochastic else None)
            target.copy_(stored if keep is None else torch.where(keep, target, stored))


Constants = tuple[float, float, float, float, float, float, Tensor, Tensor, Tensor | None]


def _constants(group: dict[str, Any], step: Tensor, grad_scale: Tensor | None) -> Constants:
    """Decay, betas and their complements, eps; step size, 1 / sqrt(1 - beta2^t), 1 / scale."""
    lr, eps = float(group["lr"]), float(group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    exact = step.double() + 1.0
    correction1 = (1.0 - torch.exp(exact * log_of(beta1))).float()
    correction2 = (1.0 - torch.exp(exact * log_of(beta2))).sqrt().float()
    return (
        lr * float(group["weight_decay"]),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        torch.full_like(correction1, lr) / correction1,
        torch.ones_like(correction2) / correction2,
        None if grad_scale is None else torch.ones_like(grad_scale) / grad_scale,
    )


def _updated(old: list[Tensor], constants: Constants) -> tuple[Tensor, Tensor, Tensor]:
    """New weight and moments in float32; the update is made from the unrounded moments."""
    decay, beta1, rest1, beta2, rest2, eps, step_size, inverse2, inverse_scale = constants
    p, g, m, v = (tensor.float() for tensor in old)
    if inverse_scale is not None:
        g = g * inverse_scale
    p -= decay * p
    m = m * beta1 + g * rest1
    v = v * beta2 + g * rest2 * g
    p -= m * step_size / (v.sqrt() * inverse2 + eps)
    return p, m, v


def _pieces(runs: tuple[Run, ...]) -> Iterator[Run]:
    for offset, first, count in runs:
        for start in range(0, count, PIECE):
            yield offset + start, first + start, min(PIECE, count - start)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16 & 0xFFFF)  # torch's shifts of int32 copy the sign
    x = x * _signed(MULTIPLIERS[0])
    x = x ^ (x >> 13 & 0x7FFFF)
    x = x * _signed(MULTIPLIERS[1])
    return x ^ (x >> 16 & 0xFFFF)


def _low_half(number: Tensor) -> Tensor:
    """The lower 32 bits of int64 numbers, as int32."""
    return number.view(torch.int32)[::2]


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word
