"""The Adam convention of the GaLore family (METHODS: ADAM-H), on any tensor.

Moments in 8 bits have one code per element and one scale per block of 256 elements: block-wise
dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861). A block is divided by its largest
magnitude, and each element is replaced by the nearest of 255 values that lie dense near zero on a
logarithmic scale: each decade 10^-e, e = 0 ... 6, has half as many as the one above. Code 0 is the
value zero, so that zeroing codes zeroes the moments. First moments use signed codes (int8), second
moments unsigned ones (uint8) with twice the resolution. Relative error within a decade: at most
about 1 % near the block's maximum, more for smaller elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

PIECE = 16 * 1024 * 1024
BLOCK = 256
"""Elements that share the scale of 8-bit moments."""
# Smaller tensors stay in fp32: their scales and codes would save nothing that matters.
MINIMUM = 4096


def advance_moments(
    states: Sequence[dict[str, Any]],
    grads: Sequence[torch.Tensor],
    betas: tuple[float, float],
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g*g of many tensors, in place in ``states``.

    Returns the m and the v. Moments are created as zeros of ``dtype`` and of the gradient's shape.
    In bf16 every operation rounds to bf16, as in published pure-bf16 runs. All tensors together
    take a handful of kernels.
    """
    for state, grad in zip(states, grads, strict=True):
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states]
    cast = [grad.to(dtype) for grad in grads]
    torch._foreach_mul_(first, betas[0])
    torch._foreach_add_(first, cast, alpha=1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, cast, cast, value=1 - betas[1])
    return first, second


def directions(
    states: Sequence[dict[str, Any]],
    grads: Sequence[torch.Tensor],
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """N = m / (sqrt(v) + eps) of many tensors, moments advanced first; dtype of the moments."""
    if not grads:
        return []
    first, second = advance_moments(states, grads, betas, dtype)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_add_(denominator, eps)
    return list(torch._foreach_div(first, denominator))


def direction(
    state: dict[str, Any],
    grad: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`directions` of one tensor."""
    return directions([state], [grad], betas, eps, dtype)[0]


def directions_8bit(
    states: Sequence[dict[str, Any]], grads: torch.Tensor, betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """N of a batch (b, ...) of tensors whose moments are kept in 8 bits between updates.

    Computed in fp32. Tensors below 4096 elements keep fp32 moments.
    """
    if grads[0].numel() < MINIMUM:
        return torch.stack(directions(states, grads.unbind(), betas, eps, torch.float32))
    moments: dict[str, Any] = {}
    for key, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        for state in states:
            if key not in state:
                state[key] = torch.zeros_like(grads[0], dtype=dtype)
                blocks = -(-grads[0].numel() // BLOCK)
                state[f"{key}_scale"] = grads.new_zeros(blocks, dtype=torch.float32)
        codes = torch.stack([state[key] for state in states])
        scales = torch.stack([state[f"{key}_scale"] for state in states])
        moments[key] = decode(codes, scales)
    found = direction(moments, grads, betas, eps, torch.float32)
    for key in ("exp_avg", "exp_avg_sq"):
        codes, scales = encode(moments[key], signed=key == "exp_avg")
        for state, code, scale in zip(states, codes, scales, strict=True):
            state[key].copy_(code)
            state[f"{key}_scale"].copy_(scale)
    return found


def update_flat(
    flat: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    scaling: tuple[float, float],
    dtype: torch.dtype,
    prepare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """ADAM-H's update of a flat slice with ``scaling`` = (step size, decay), piece by piece.

    A slice holds most of a model: in pieces of 16 M elements the temporaries stay small.
    ``prepare(g, v)`` may change a piece of the gradient, given the second moments before it enters.
    """
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(flat, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(flat, dtype=dtype)
    parts = [x.split(PIECE) for x in (flat, grad, state["exp_avg"], state["exp_avg_sq"])]
    for weight, g, first, second in zip(*parts, strict=True):
        if prepare is not None:
            g = prepare(g, second)
        moments = {"exp_avg": first, "exp_avg_sq": second}
        update = direction(moments, g, group["betas"], group["eps"], dtype)
        apply_update(weight, update, *scaling)


def adamw_flat(
    flat: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    lr: float,
    dtype: torch.dtype,
) -> None:
    """torch's AdamW of a flat slice: eps outside the bias correction, decay first.

    Its k is ``state["step"]``. In pieces, as :func:`update_flat`.
    """
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(flat, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(flat, dtype=dtype)
    betas, step = group["betas"], state["step"]
    parts = [x.split(PIECE) for x in (flat, grad, state["exp_avg"], state["exp_avg_sq"])]
    for weight, g, m, v in zip(*parts, strict=True):
        advance_moments([{"exp_avg": m, "exp_avg_sq": v}], [g], betas, dtype)
        root = (v.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(group["eps"])
        weight.mul_(1 - lr * group["weight_decay"])
        weight.add_((m / root).to(weight.dtype), alpha=-lr / (1 - betas[0] ** step))


def step_size(lr: float, betas: tuple[float, float], step: int) -> float:
    """lr * sqrt(1 - b2^k) / (1 - b1^k) for the one-based counter k = ``step``."""
    return lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


def apply_updates(
    weights: Sequence[torch.Tensor], updates: Sequence[torch.Tensor], size: float, decay: float
) -> None:
    """W <- W - size * U, then W <- W - decay * W (decay = lr * weight_decay, on the new W)."""
    if weights:
        cast = [update.to(weight.dtype) for weight, update in zip(weights, updates, strict=True)]
        torch._foreach_add_(list(weights), cast, alpha=-size)
        if decay > 0:
            torch._foreach_mul_(list(weights), 1 - decay)


def apply_update(weight: torch.Tensor, update: torch.Tensor, size: float, decay: float) -> None:
    """:func:`apply_updates` of one tensor."""
    apply_updates([weight], [update], size, decay)


@lru_cache(maxsize=8)
def _levels(signed: bool, device: torch.device) -> torch.Tensor:
    """Positive values of the codes 1, 2, ... in ascending order; the last is 1. fp32."""
    first = 6 if signed else 7
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (first - exponent) + 1, dtype=torch.float64)
        decades.append(10.0**-exponent * (edges[:-1] + edges[1:]) / 2)
    values = torch.cat(decades).sort().values
    if signed:
        values[-1] = 1.0
    else:
        values = torch.cat([values, torch.ones(1, dtype=torch.float64)])
    return values.float().to(device)


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of the same shape, fp32 scales (b, blocks)) of a batch of b tensors (b, ...).

    Blocks of 256 elements in row-major order of each tensor.
    """
    flat = values.float().flatten(1)
    count = -(-flat.shape[1] // BLOCK)
    blocks = torch.nn.functional.pad(flat, (0, count * BLOCK - flat.shape[1]))
    blocks = blocks.view(len(flat), count, BLOCK)
    scales = blocks.abs().amax(dim=2)
    unit = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    levels = torch.cat([unit.new_zeros(1), _levels(signed, values.device)])
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(unit.abs(), middles)  # index of the nearest level
    if signed:
        codes = torch.where(unit < 0, -codes, codes)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    return codes.flatten(1)[:, : flat.shape[1]].reshape(values.shape), scales


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`encode`: fp32 values of the shape of ``codes``."""
    signed = codes.dtype == torch.int8
    positive = _levels(signed, codes.device)
    table = torch.cat([positive.new_zeros(1), positive])
    if signed:  # negative codes index the table from its end
        table = torch.cat([table, -positive.flip(0)])
    flat = codes.flatten(1)
    values = table[flat.long()] if signed else table[flat.int()]
    spread = scales.repeat_interleave(BLOCK, dim=1)[:, : flat.shape[1]]
    return (values * spread).view(codes.shape)
