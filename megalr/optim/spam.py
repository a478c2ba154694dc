"""SPAM: Adam with spike clipping, periodic moment resets and an optional sparse mask."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from megalr.config.optimizers import SPAMOptimizer
from megalr.optim import adam_h
from megalr.optim.projection import mixed_seed
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.sharding.fragment import FlatLayout


class SPAM(ShardedOptimizer):
    """SPAM (Huang et al. 2025, arXiv 2501.06842; docs/methods/optimizers.md). Elementwise.

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

    declared = (SPAMOptimizer,)
    marks: ClassVar[dict[str, Any]] = {"density": None}

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
        update_number = state["updates"] + 1
        if gap and update_number % gap == 0 and "exp_avg" in state:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        state["step"] += 1
        size = _warmup(state["since_reset"], group["warmup_epoch"]) * adam_h.step_size(
            group["lr"], group["betas"], state["step"]
        )
        decay = group["lr"] * group["weight_decay"]
        if group["compat"] == "published" and group["density"] is not None:
            decay = 0.0
        self._move(parameter, flat, grad, group, (size, decay), update_number)
        state["updates"] = update_number
        state["since_reset"] += 1
        if gap and (update_number + 1) % gap == 0:
            state["since_reset"] = 0
            if masked:
                self._change_mask(parameter, flat, group)

    def _move(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        scaling: tuple[float, float],
        update_number: int,
    ) -> None:
        """Clip spikes and make the step, on all elements or on those of the mask."""
        state, dtype = self.state[parameter], self._moment_dtype(parameter)
        clipping = "exp_avg_sq" in state and _clips(group, update_number)

        def clip(g: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return _clip_spikes(g, second, group) if clipping else g

        mask = state.get("mask")
        if mask is None:
            adam_h.update_flat(flat, grad, state, group, scaling, dtype, clip)
            return
        grad = grad[mask]
        if clipping:
            grad = clip(grad, state["exp_avg_sq"])
        update = adam_h.direction(state, grad, group["betas"], group["eps"], dtype)
        update = torch.zeros_like(flat, dtype=dtype).masked_scatter_(mask, update)
        adam_h.apply_update(flat, update, *scaling)

    def _draw_mask(
        self, layout: FlatLayout, flat: torch.Tensor, group: dict[str, Any], index: int
    ) -> torch.Tensor:
        """Boolean mask over ``flat``: each tensor's mask is drawn whole, a rank keeps its part."""
        mask = torch.zeros_like(flat, dtype=torch.bool)
        for tensor, fragment in layout.local:
            seed = mixed_seed(self.seed, tensor.number, index)
            generator = torch.Generator().manual_seed(seed)
            if index == 0:
                count = int(group["density"] * tensor.numel)
                drawn = torch.zeros(tensor.numel, dtype=torch.bool)
                drawn[torch.randperm(tensor.numel, generator=generator)[:count]] = True
            else:
                drawn = torch.rand(tensor.numel, generator=generator) < group["density"]
            fragment.of(mask).copy_(drawn[fragment.start : fragment.stop])
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


def _clips(group: dict[str, Any], update_number: int) -> bool:
    """Whether spikes are clipped at this update: the moments are old enough."""
    since = update_number % group["update_gap"] if group["update_gap"] else update_number
    return group["threshold"] > 0 and min(update_number, since) >= group["grad_accu_steps"]


def _clip_spikes(grad: torch.Tensor, second: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Clip g to sign(g) sqrt(threshold v) where g^2 > threshold v."""
    limit = (group["threshold"] * second).to(grad.dtype)
    spike = grad.square() > limit
    if group["compat"] == "none":
        spike &= limit > 0
    return torch.where(spike, grad.sign() * limit.sqrt(), grad)
