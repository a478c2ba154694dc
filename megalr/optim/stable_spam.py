"""Stable-SPAM: adaptive spike rescaling, gradient-norm normalization and momentum reset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megalr.config.optimizers import StableSPAMOptimizer
from megalr.optim import adam_h
from megalr.optim.sharded_optimizer import ShardedOptimizer, scalar_dtype
from megalr.sharding.exchange import reduce_over_ranks
from megalr.sharding.fragment import FlatLayout, Fragment


@dataclass(frozen=True)
class Change:
    """The change of one fragment of the gradient: elements above ``bound`` are rescaled by
    ``bound / largest``, then all are multiplied by ``factor``."""

    fragment: Fragment
    largest: float
    bound: float
    factor: float


class StableSPAM(ShardedOptimizer):
    """Stable-SPAM (Huang et al. 2025, arXiv 2502.17055; docs/methods/optimizers.md). Elementwise.

    Per logical tensor, at its k-th update, with sigma annealed from 1 to ``eta`` by a cosine over
    ``total_T`` updates (None: always 1), b1' = sigma b1 and g1' = sigma gamma1:

    * W <- W - lr * weight_decay * W;
    * AdaClip: M <- average of max|G| with gamma3; where |G| exceeds the bias-corrected M, G is
      rescaled by M / max|G|;
    * AdaGN: a, b <- averages of |G| and |G|^2 with g1' and gamma2, and
      G <- G / |G| * a / (sqrt(b) + eps), both bias-corrected;
    * every ``update_gap`` updates m, v <- 0 and k <- 1, then AdamW's step (eps outside the bias
      correction) with b1'.

    State: as AdamW plus 3 scalars per tensor, kept in fp32 at least. gamma1 = -1 means beta1.

    Here the averages M, a, b have a bias correction of their own that is not restarted, a reset
    happens before the gradient enters the moments, and sigma stays at ``eta`` after ``total_T``.
    ``compat="published"``: the three accidents of the published code. At a reset the *old*
    moments make one more step and the update's gradient is lost; the bias corrections of M, a, b
    restart with k, which switches AdaClip off for hundreds of updates; sigma is periodic.
    """

    per_tensor_states = ("max_average", "norm_average", "squared_norm_average")
    declared = (StableSPAMOptimizer,)

    def _update(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        state = self.state[parameter]
        layout = self.layout(parameter)
        if not state:
            dtype = self._moment_dtype(parameter)
            state.update(step=0, updates=0)
            state["exp_avg"] = torch.zeros_like(flat, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(flat, dtype=dtype)
            for key in self.per_tensor_states:
                state[key] = flat.new_zeros(len(layout.tensors), dtype=scalar_dtype(flat.dtype))
        published = group["compat"] == "published"
        state["updates"] += 1
        state["step"] += 1
        sigma = _anneal(state["updates"], group["total_T"], group["eta"], published)
        if group["weight_decay"] > 0:
            flat.mul_(1 - group["lr"] * group["weight_decay"])
        reset = group["update_gap"] != 0 and state["updates"] % group["update_gap"] == 0
        changes = _statistics(layout, grad, state, group, sigma)
        if reset:
            state["step"] = 1
            if not published:
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        for part in _parts(changes):
            self._step_part(flat, grad, state, group, sigma, part)
        if reset and published:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    def _step_part(
        self,
        flat: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        sigma: float,
        part: list[Change],
    ) -> None:
        """Stabilize the gradient of some neighbouring tensors and make AdamW's step there."""
        begin = part[0].fragment.offset
        length = part[-1].fragment.offset + part[-1].fragment.numel - begin
        dtype = state["exp_avg"].dtype
        g = grad.narrow(0, begin, length).clone()
        views = [g.narrow(0, c.fragment.offset - begin, c.fragment.numel) for c in part]
        for view, change in zip(views, part, strict=True):
            if change.largest > change.bound:
                view.copy_(_rescaled(view, change))
        torch._foreach_mul_(views, [change.factor for change in part])
        g = g.to(dtype)
        first, second, weight = (
            x.narrow(0, begin, length) for x in (state["exp_avg"], state["exp_avg_sq"], flat)
        )
        beta1, beta2 = group["betas"][0] * sigma, group["betas"][1]
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step = state["step"]
        denominator = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        update = (first / denominator).to(weight.dtype)
        weight.add_(update, alpha=-group["lr"] / (1 - beta1**step))


def _anneal(update: int, total: int | None, eta: float, periodic: bool) -> float:
    """sigma at the one-based ``update``: 1 -> eta by half a cosine over ``total`` updates."""
    if total is None:
        return 1.0
    position = update if periodic else min(update, total + 1)
    return eta + (1 - eta) * 0.5 * (1 + math.cos(math.pi * position / (total + 1)))


def _rescaled(piece: torch.Tensor, change: Change) -> torch.Tensor:
    """AdaClip of one piece: elements above the bound times bound / largest."""
    scale = change.bound / change.largest
    return torch.where(piece.abs() > change.bound, piece * scale, piece)


def _statistics(
    layout: FlatLayout,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    sigma: float,
) -> list[Change]:
    """Advance M, a and b of every tensor; how each piece held here is to be changed.

    The maximum and the norm of a tensor that is split over ranks are completed by one all-reduce
    each, for all tensors of the layout together.
    """
    maxima = state["max_average"]
    # Bias corrections: k as published, or the number of updates the averages have seen.
    seen = state["step"] if group["compat"] == "published" else state["updates"]
    number = {tensor.number: i for i, tensor in enumerate(layout.tensors)}
    # The dtype of an empty list would be float: a rank may hold nothing but padding.
    places = [number[t.number] for t, _ in layout.local]
    held = torch.tensor(places, dtype=torch.int64, device=grad.device)
    pieces = [fragment.of(grad) for _, fragment in layout.local]
    gamma3 = group["gamma3"]
    largest = _per_tensor(pieces, held, math.inf, maxima)
    reduce_over_ranks(largest, layout.ranks, dist.ReduceOp.MAX)
    maxima.mul_(gamma3).add_(largest, alpha=1 - gamma3)
    limit = maxima / (1 - gamma3**seen)
    changes = [
        Change(fragment, top, bound, 1.0)
        for (_, fragment), top, bound in zip(
            layout.local, largest[held].tolist(), limit[held].tolist(), strict=True
        )
    ]
    norms = _per_tensor(pieces, held, 2, maxima)
    for i, (view, change) in enumerate(zip(pieces, changes, strict=True)):
        if change.largest > change.bound:
            clipped = _rescaled(view, change)
            norms[held[i]] = torch.linalg.vector_norm(clipped, dtype=norms.dtype)
    if layout.ranks.size > 1:
        norms = reduce_over_ranks(norms.square(), layout.ranks, dist.ReduceOp.SUM).sqrt()
    gamma1 = (group["betas"][0] if group["gamma1"] == -1 else group["gamma1"]) * sigma
    gamma2 = group["gamma2"]
    state["norm_average"].mul_(gamma1).add_(norms, alpha=1 - gamma1)
    state["squared_norm_average"].mul_(gamma2).add_(norms.square(), alpha=1 - gamma2)
    wanted = state["norm_average"] / (1 - gamma1**seen)
    root = (state["squared_norm_average"] / (1 - gamma2**seen)).sqrt() + group["eps"]
    factors = torch.where(norms > 0, wanted / root / norms, torch.ones_like(norms))
    return [
        replace(change, factor=factor)
        for change, factor in zip(changes, factors[held].tolist(), strict=True)
    ]


def _parts(changes: list[Change], limit: int = adam_h.PIECE) -> Iterator[list[Change]]:
    """Runs of neighbouring pieces of about ``limit`` elements, so that temporaries stay small."""
    part: list[Change] = []
    for change in sorted(changes, key=lambda c: c.fragment.offset):
        stop = change.fragment.offset + change.fragment.numel
        if part and stop - part[0].fragment.offset > limit:
            yield part
            part = []
        part.append(change)
    if part:
        yield part


def _per_tensor(
    pieces: list[torch.Tensor], held: torch.Tensor, order: float, like: torch.Tensor
) -> torch.Tensor:
    """Norm of each piece at the place of its tensor in a vector like ``like``, zero elsewhere."""
    result = torch.zeros_like(like)
    if pieces:
        result[held] = torch.stack(torch._foreach_norm(pieces, order, like.dtype))
    return result
