"""SPAM: Adam that clips spikes, forgets its moments now and then, and may be sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.base import LogicalOptimizer
from megalr.optim.layout import FlatLayout
from megalr.optim.matrix import COMPAT, check_choice
from megalr.optim.projection import mixed_seed


class SPAM(LogicalOptimizer):
    """SPAM (Huang et al. 2025, arXiv 2501.06842; METHODS §3). Elementwise.

    At update j (one-based), with j mod ``update_gap`` = i:

    * i = 0: m, v <- 0 before the moments advance (the bias-correction counter goes on);
    * j >= ``grad_accu_steps`` and i >= ``grad_accu_steps``: where g^2 > threshold * v, g becomes
      sign(g) sqrt(threshold * v), with v before this update;
    * ADAM-H, with the learning rate multiplied by a cosine 0.01 -> 1 over ``warmup_epoch``
      updates after each reset (1 in the first period); then decay by lr * weight_decay.

    A group with ``density`` d < 1 updates the elements of a random mask only: floor(d m n) of
    them at first, a Bernoulli(d) mask after each period, redrawn from ``seed`` and the tensor's
    number; moments of elements in both masks are kept. State: 2 d m n elements, and m n bytes of
    mask when d < 1. Coordinates whose v is still zero are not clipped.

    ``compat="published"`` clips them to zero, which locks them out until the next reset (rare
    tokens' embeddings), and applies no weight decay to groups that have a density.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        threshold: float = 5000.0,
        update_gap: int = 500,
        warmup_epoch: int = 150,
        density: float | None = None,
        grad_accu_steps: int = 20,
        compat: str = "none",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "threshold": threshold,
            "update_gap": update_gap,
            "warmup_epoch": warmup_epoch,
            "density": density,
            "grad_accu_steps": grad_accu_steps,
            "compat": compat,
        }
        super().__init__(params, options, state_dtype)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("compat", group["compat"], COMPAT)
        if group["threshold"] < 0:
            raise UserError(f"threshold must be >= 0 (0: no clipping), got {group['threshold']}")
        for name in ("update_gap", "warmup_epoch", "grad_accu_steps"):
            if group[name] < 0:
                raise UserError(f"{name} must be >= 0 updates, got {group[name]}")
        density = group["density"]
        if density is not None and not 0 < density <= 1:
            raise UserError(f"density must be in (0, 1], got {density}")

    def _update(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        state, gap = self.state[parameter], group["update_gap"]
        masked = group["density"] is not None and group["density"] < 1
        if not state:
            state.update(step=0, updates=0, since_reset=group["warmup_epoch"] + 1, masks=0)
            if masked:
                state["mask"] = self._draw_mask(self.layout(parameter), flat, group, 0)
        mask = state.get("mask")
        if mask is not None:
            grad = grad[mask]
        update_number = state["updates"] + 1
        if gap and update_number % gap == 0 and "exp_avg" in state:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        state["step"] += 1
        grad = _clip_spikes(grad, state, group, update_number)
        dtype = self._moment_dtype(parameter)
        update = adam_h.direction(state, grad, group["betas"], group["eps"], dtype)
        if mask is not None:
            update = torch.zeros_like(flat, dtype=dtype).masked_scatter_(mask, update)
        size = _warmup(state["since_reset"], group["warmup_epoch"]) * adam_h.step_size(
            group["lr"], group["betas"], state["step"]
        )
        decay = group["lr"] * group["weight_decay"]
        if group["compat"] == "published" and group["density"] is not None:
            decay = 0.0
        adam_h.apply_update(flat, update, size, decay)
        state["updates"] = update_number
        state["since_reset"] += 1
        if gap and (update_number + 1) % gap == 0:
            state["since_reset"] = 0
            if masked:
                self._change_mask(parameter, flat, group)

    def _draw_mask(
        self, layout: FlatLayout, flat: torch.Tensor, group: dict[str, Any], index: int
    ) -> torch.Tensor:
        """Boolean mask over ``flat``: each tensor's mask is drawn whole, then cut as it is."""
        mask = torch.zeros_like(flat, dtype=torch.bool)
        for tensor, piece in layout.local:
            seed = mixed_seed(self.seed, tensor.number, index)
            generator = torch.Generator().manual_seed(seed)
            if index == 0:
                count = int(group["density"] * tensor.numel)
                drawn = torch.zeros(tensor.numel, dtype=torch.bool)
                drawn[torch.randperm(tensor.numel, generator=generator)[:count]] = True
            else:
                drawn = torch.rand(tensor.numel, generator=generator) < group["density"]
            part = drawn.narrow(0, piece.start, piece.length).to(flat.device)
            mask.narrow(0, piece.offset, piece.length).copy_(part)
        return mask

    def _change_mask(
        self, parameter: torch.Tensor, flat: torch.Tensor, group: dict[str, Any]
    ) -> None:
        """Draw the next mask; moments of the intersection are kept, the others start at zero."""
        state = self.state[parameter]
        state["masks"] += 1
        mask = self._draw_mask(self.layout(parameter), flat, group, state["masks"])
        for key in ("exp_avg", "exp_avg_sq"):
            dense = torch.zeros_like(flat, dtype=state[key].dtype)
            state[key] = dense.masked_scatter_(state["mask"], state[key])[mask]
        state["mask"] = mask


def _warmup(since_reset: int, length: int) -> float:
    """Learning-rate factor 1 - rho: 0.01 right after a reset, 1 from ``length`` updates on."""
    if since_reset >= length:
        return 1.0
    return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since_reset / (length + 1)))


def _clip_spikes(
    grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any], update_number: int
) -> torch.Tensor:
    """Clip g to sign(g) sqrt(threshold v) where g^2 > threshold v, if moments are old enough."""
    gap, patience, threshold = group["update_gap"], group["grad_accu_steps"], group["threshold"]
    since = update_number % gap if gap else update_number
    if not threshold or min(update_number, since) < patience or "exp_avg_sq" not in state:
        return grad
    limit = (threshold * state["exp_avg_sq"]).to(grad.dtype)
    spike = grad.square() > limit
    if group["compat"] == "none":
        spike &= limit > 0
    return torch.where(spike, grad.sign() * limit.sqrt(), grad)
