"""The Adam convention of the GaLore family (METHODS: ADAM-H), on any tensor."""

from __future__ import annotations

import math
from typing import Any

import torch

from megalr.optim.quantized import MINIMUM, decode, encode


def advance_moments(
    state: dict[str, Any],
    grad: torch.Tensor,
    betas: tuple[float, float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g*g, in place in ``state``; returns (m, v).

    The moments are created as zeros of ``dtype`` and of the gradient's shape. In bf16 every
    operation rounds to bf16, as in published pure-bf16 runs.
    """
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
    grad = grad.to(dtype)
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    return first, second


def direction(
    state: dict[str, Any],
    grad: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """N = m / (sqrt(v) + eps) after advancing the moments by ``grad``; dtype of the moments."""
    first, second = advance_moments(state, grad, betas, dtype)
    return first / second.sqrt().add_(eps)


def direction_8bit(
    state: dict[str, Any], grad: torch.Tensor, betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """:func:`direction` with moments stored in 8 bits between updates, computed in fp32.

    Tensors below 4096 elements keep fp32 moments.
    """
    if grad.numel() < MINIMUM:
        return direction(state, grad, betas, eps, torch.float32)
    moments: dict[str, Any] = {}
    if "exp_avg" in state:
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = decode(state[key], state[f"{key}_scale"], torch.float32)
    found = direction(moments, grad, betas, eps, torch.float32)
    for key in ("exp_avg", "exp_avg_sq"):
        codes, scales = encode(moments[key], signed=key == "exp_avg")
        state[key], state[f"{key}_scale"] = codes, scales
    return found


def step_size(lr: float, betas: tuple[float, float], step: int) -> float:
    """lr * sqrt(1 - b2^k) / (1 - b1^k) for the one-based counter k = ``step``."""
    return lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


def apply_update(weight: torch.Tensor, update: torch.Tensor, size: float, decay: float) -> None:
    """W <- W - size * U, then W <- W - decay * W (decay = lr * weight_decay, on the new W)."""
    weight.add_(update.to(weight.dtype), alpha=-size)
    if decay > 0:
        weight.mul_(1 - decay)
