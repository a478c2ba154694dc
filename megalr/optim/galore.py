"""GaLore and Fira: Adam in the leading singular subspace of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.layout import LogicalTensor
from megalr.optim.matrix import COMPAT, MatrixOptimizer, check_choice, limit_growth
from megalr.optim.projection import back_project, project, side_of


class GaLore(MatrixOptimizer):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507; METHODS §8).

    Every ``update_proj_gap`` updates P becomes the leading ``rank`` singular vectors of G. With
    R = G P (or P^T G, or P^T G Q for ``full``) and ADAM-H on R:
    W <- W - step_size * scale * (N P^T), then W <- W - lr * weight_decay * W. Moments and counter
    are carried over unchanged when P changes. Groups without rank: plain ADAM-H at the same lr.

    State of a matrix of sizes s <= l (elements): s r + 2 l r (full: (m + n) r + 2 r^2).
    ``basis``: svd (the published full SVD), subspace (randomized iteration) or auto. ``limiter``:
    Fira's limiter on the update (off as published). ``state_bits=8`` keeps the moments of target
    matrices in 8 bits (:mod:`megalr.optim.quantized`): 2 l r bytes and a scale a 256 elements.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        basis: str = "auto",
        stagger: bool = False,
        limiter: bool = False,
        state_bits: int = 32,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "basis": basis,
            "stagger": stagger,
            "limiter": limiter,
            "state_bits": state_bits,
        }
        super().__init__(params, options, state_dtype, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        side_of((1, 1), group["proj_type"])
        if group["state_bits"] not in (8, 32):
            raise UserError(f"state_bits must be 8 or 32, got {group['state_bits']}")

    def _refresh(
        self,
        own: dict[str, Any],
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        done: int,
    ) -> bool:
        side = side_of(tensor.shape, group["proj_type"])
        return self._leading(own, tensor, grad, group, done, side)

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: list[torch.Tensor],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        betas, eps = group["betas"], group["eps"]
        sides = [side_of(tuple(grad.shape), group["proj_type"]) for grad in grads]
        low = [_down(own, grad, side) for own, grad, side in zip(owns, grads, sides, strict=True)]
        if group["state_bits"] == 8:
            found = [
                adam_h.direction_8bit(own, r, betas, eps) for own, r in zip(owns, low, strict=True)
            ]
        else:
            found = adam_h.directions(owns, low, betas, eps, dtype)
        torch._foreach_mul_(found, group["scale"])
        updates = [
            _up(own, normalized.to(grad.dtype), side)
            for own, grad, normalized, side in zip(owns, grads, found, sides, strict=True)
        ]
        if group["limiter"]:
            limit_growth(owns, updates, guard=True)
        return updates


def _down(own: dict[str, Any], grad: torch.Tensor, side: str) -> torch.Tensor:
    """R from G: G P, P^T G or, for ``full``, P^T G Q."""
    basis = own["projector"].to(grad.dtype)
    if side == "full":
        return basis.mT @ grad @ own["projector2"].to(grad.dtype)
    return project(grad, basis, side)


def _up(own: dict[str, Any], low: torch.Tensor, side: str) -> torch.Tensor:
    """The way back of :func:`_down`, to the gradient's shape."""
    basis = own["projector"].to(low.dtype)
    if side == "full":
        return basis @ low @ own["projector2"].to(low.dtype).mT
    return back_project(low, basis, side)


class Fira(MatrixOptimizer):
    """Fira (Chen et al. 2024, arXiv 2410.01623; METHODS §9): GaLore plus the scaled residual.

    With R, N as in GaLore and phi = |N| / (|R| + 1e-8) along the axis of size r (one factor a row
    for right projections, a column for left ones):
    E = (G - P P^T G) * phi, limited so that |E| grows by at most 1 % an update;
    W <- W - step_size * (scale * back(N) + E), then decay. ``limiter`` False switches the limiter
    off. ``scale`` is called alpha in the paper.

    ``compat="published"`` subtracts scale * P P^T G (all published scripts have scale < 1, so most
    of the gradient inside the subspace stays in their residual) and has no guard against a
    remembered norm of zero. State: s r + 2 l r + 1 elements.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        basis: str = "auto",
        stagger: bool = False,
        limiter: bool = True,
        compat: str = "none",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "basis": basis,
            "stagger": stagger,
            "limiter": limiter,
            "compat": compat,
        }
        super().__init__(params, options, state_dtype, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("compat", group["compat"], COMPAT)
        if side_of((1, 1), group["proj_type"]) == "full":
            raise UserError("Fira's scaling needs a one-sided projection: proj_type cannot be full")

    def _refresh(
        self,
        own: dict[str, Any],
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        done: int,
    ) -> bool:
        side = side_of(tensor.shape, group["proj_type"])
        return self._leading(own, tensor, grad, group, done, side)

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: list[torch.Tensor],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        scale, published = group["scale"], group["compat"] == "published"
        sides = [side_of(tuple(grad.shape), group["proj_type"]) for grad in grads]
        low = [_down(own, grad, side) for own, grad, side in zip(owns, grads, sides, strict=True)]
        found = adam_h.directions(owns, low, group["betas"], group["eps"], dtype)
        kept = scale if published else 1.0
        residuals = []
        for own, grad, r, normalized, side in zip(owns, grads, low, found, sides, strict=True):
            factor = channel_factors(normalized.to(grad.dtype), r, side)
            residuals.append(_add_back(grad, own, r, side, -kept).mul_(factor))
        if group["limiter"]:
            limit_growth(owns, residuals, guard=not published)
        return [
            _add_back(residual, own, normalized.to(residual.dtype), side, scale)
            for own, residual, normalized, side in zip(owns, residuals, found, sides, strict=True)
        ]


def _add_back(
    matrix: torch.Tensor, own: dict[str, Any], low: torch.Tensor, side: str, scale: float
) -> torch.Tensor:
    """matrix + scale * back_project(low), in one product."""
    basis = own["projector"].to(matrix.dtype)
    pair = (low, basis.mT) if side == "right" else (basis, low)
    return torch.addmm(matrix, *pair, alpha=scale)


def channel_factors(normalized: torch.Tensor, low: torch.Tensor, side: str) -> torch.Tensor:
    """|N| / (|R| + 1e-8) along the axis of size r: (m, 1) for a right projection, else (1, n)."""
    axis = 1 if side == "right" else 0
    length = torch.linalg.vector_norm
    above = length(normalized, dim=axis, keepdim=True)
    return above / (length(low, dim=axis, keepdim=True) + 1e-8)
