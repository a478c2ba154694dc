"""Adam in a subspace of the gradient: GaLore, Fira and GoLore step inside it, and APOLLO and
APOLLO-Mini scale the raw gradient as Adam scales it there."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from megalr.config.base import Section
from megalr.config.optimizers import AdamWOptimizer
from megalr.config.projected import (
    ApolloMethod,
    ApolloMiniMethod,
    FiraMethod,
    GaLoreMethod,
    GoLoreMethod,
)
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.matrix import (
    MatrixOptimizer,
    adam_directions,
    limit_growth,
    stacked,
)
from megalr.optim.projection import (
    back_project,
    gaussian_basis,
    mixed_seed,
    next_seed,
    project,
    random_orthonormal_basis,
    side_of,
)
from megalr.sharding.fragment import LogicalTensor


class GaLore(MatrixOptimizer):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507; docs/methods/projected.md).

    Every ``update_proj_gap`` updates P becomes the leading ``rank`` singular vectors of G. With
    R = G P (or P^T G, or P^T G Q for ``full``) and ADAM-H on R:
    W <- W - step_size * scale * (N P^T), then W <- W - lr * weight_decay * W. Moments and counter
    are carried over unchanged when P changes. Groups without rank: plain ADAM-H at the same lr.

    State of a matrix of sizes s <= l (elements): s r + 2 l r (full: (m + n) r + 2 r^2).
    ``basis``: svd (the published full SVD), subspace (randomized iteration) or auto. ``limiter``:
    Fira's limiter on the update (off as published). ``state_bits=8`` keeps the moments of target
    matrices in 8 bits (:mod:`megalr.optim.adam_h`): 2 l r bytes and one scale per 256 elements.
    """

    declared = (AdamWOptimizer, GaLoreMethod)

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: torch.Tensor,
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        side = side_of(tuple(grads.shape[1:]), group["proj_type"])
        basis = stacked(owns, "projector", grads.dtype)
        other = stacked(owns, "projector2", grads.dtype) if side == "full" else None
        low = project(grads, basis, side) if other is None else basis.mT @ grads @ other
        if group["state_bits"] == 8:
            found = adam_h.directions_8bit(owns, low, group["betas"], group["eps"])
            normalized = found.to(low.dtype)
        else:
            normalized = adam_directions(owns, low, group, dtype)
        normalized *= group["scale"]
        if other is None:
            updates = back_project(normalized, basis, side)
        else:
            updates = basis @ normalized @ other.mT
        return limit_growth(owns, updates, guard=True) if group["limiter"] else updates


class Fira(MatrixOptimizer):
    """Fira (Chen et al. 2024, arXiv 2410.01623; docs/methods/projected.md).

    GaLore plus the scaled residual.

    With R, N as in GaLore and phi = |N| / (|R| + 1e-8) along the axis of size r (one factor a row
    for right projections, a column for left ones):
    E = (G - P P^T G) * phi, limited so that |E| grows by at most 1 % per update;
    W <- W - step_size * (scale * back(N) + E), then decay. ``limiter`` False switches the limiter
    off. ``scale`` is called alpha in the paper.

    ``compat="published"`` subtracts scale * P P^T G (all published scripts have scale < 1, so most
    of the gradient inside the subspace stays in their residual) and has no guard against a
    remembered norm of zero. State: s r + 2 l r + 1 elements.
    """

    declared = (AdamWOptimizer, FiraMethod)

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: torch.Tensor,
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        scale, published = group["scale"], group["compat"] == "published"
        side = side_of(tuple(grads.shape[1:]), group["proj_type"])
        basis = stacked(owns, "projector", grads.dtype)
        low = project(grads, basis, side)
        normalized = adam_directions(owns, low, group, dtype)
        factors = channel_factors(normalized, low, side)
        residual = _add_back(grads, low, basis, side, -scale if published else -1.0)
        residual *= factors
        if group["limiter"]:
            limit_growth(owns, residual, guard=not published)
        return _add_back(residual, normalized, basis, side, scale)


class GoLore(MatrixOptimizer):
    """GoLore (He et al. 2024, arXiv 2410.11289; docs/methods/projected.md), in its optimizer form.

    Every ``update_proj_gap`` updates a new basis Q is taken: the leading singular vectors of G
    while u / total_updates < ``rand_ratio``, a uniformly random orthonormal basis afterwards. The
    first moment is rotated into it (right: M <- M P^T Q; left: M <- Q^T P M), second moment and
    counter are kept. ADAM-H on kappa R, and W <- W - step_size * kappa * back(N), then decay.

    The published code keeps W frozen and trains a factor A with W_eff = W - kappa A B, merged at
    each refresh; the sum of both moves exactly as written here (decay differs: there it would act
    on the factor only). Its two accidents (momentum of wide matrices not rotated, gradients of W
    not averaged over ranks) do not exist here. State: s r + 2 l r elements.
    """

    declared = (AdamWOptimizer, GoLoreMethod)
    marks: ClassVar[dict[str, Any]] = {"rank": None, "total_updates": None}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if (group["total_updates"] or 0) < 1:
            raise UserError(f"total_updates must be >= 1, got {group['total_updates']}")

    def _refresh(
        self,
        own: dict[str, Any],
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        done: int,
    ) -> bool:
        if not bool(grad.any()):
            return self._has_projector(own)
        side = side_of(tensor.shape, "std")
        old = own.get("projector")
        if done / group["total_updates"] < group["rand_ratio"]:
            self._leading(own, tensor, grad, group, done, side)
        else:
            seed = mixed_seed(self.seed, tensor.number, done)
            basis = random_orthonormal_basis(grad, group["rank"], side, seed)
            own["projector"] = basis.to(self.state_dtype or grad.dtype)
        if old is not None and "exp_avg" in own:
            turn = old.to(grad.dtype).mT @ own["projector"].to(grad.dtype)  # (r, r)
            moment = own["exp_avg"]
            first = moment.to(grad.dtype)
            moment.copy_(first @ turn if side == "right" else turn.mT @ first)
        return True

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: torch.Tensor,
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        side, kappa = side_of(tuple(grads.shape[1:]), "std"), group["kappa"]
        basis = stacked(owns, "projector", grads.dtype)
        low = kappa * project(grads, basis, side)
        normalized = adam_directions(owns, low, group, dtype)
        return back_project(kappa * normalized, basis, side)


def _add_back(
    matrices: torch.Tensor, low: torch.Tensor, basis: torch.Tensor, side: str, scale: float
) -> torch.Tensor:
    """matrices += scale * back_project(low), in one product and in place."""
    pair = (low, basis.mT) if side == "right" else (basis, low)
    return matrices.baddbmm_(*pair, alpha=scale)


def channel_factors(normalized: torch.Tensor, low: torch.Tensor, side: str) -> torch.Tensor:
    """|N| / (|R| + 1e-8) along the axis of size r: (b, m, 1) for a right projection, (b, 1, n)."""
    axis = -1 if side == "right" else -2
    length = torch.linalg.vector_norm
    above = length(normalized, dim=axis, keepdim=True)
    return above / (length(low, dim=axis, keepdim=True) + 1e-8)


class Apollo(MatrixOptimizer):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270; docs/methods/projected.md).

    R = G P or P^T G with a random P (redrawn every ``update_proj_gap`` updates) or, with
    ``proj="svd"``, the leading singular vectors; N from ADAM-H on R;
    s = |N| / (|R| + 1e-8) along the axis of size r (``scale_type="channel"``) or of the whole
    matrix (``tensor``: APOLLO-Mini); U = sqrt(scale) * limiter(G * s), the square root inside the
    limiter when ``scale_front``; W <- W - step_size * U, then decay.

    The random P is never stored: it is drawn again from its seed, so the state of an m x n matrix
    with l = max(m, n) is 2 l r elements and two scalars. Tensor number i starts from seed
    ``seed`` + i and follows the published chain of seeds (the generator runs on the gradient's
    device, so CPU and GPU draw differently). ``compat="published"`` drops the limiter's guard.
    """

    declared: ClassVar[tuple[type[Section], ...]] = (AdamWOptimizer, ApolloMethod)

    def _has_projector(self, own: dict[str, Any]) -> bool:
        return "projector" in own or "seed" in own

    def _refresh(
        self,
        own: dict[str, Any],
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        done: int,
    ) -> bool:
        if group["proj"] == "svd":
            side = side_of(tensor.shape, group["proj_type"])
            return self._leading(own, tensor, grad, group, done, side)
        seed = own.get("seed")
        own["seed"] = self.seed + tensor.number if seed is None else next_seed(seed)
        return True

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: torch.Tensor,
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        side = side_of(tuple(grads.shape[1:]), group["proj_type"])
        if group["proj"] == "svd":
            basis = stacked(owns, "projector", grads.dtype)
        else:
            rank = group["rank"]
            basis = torch.stack([gaussian_basis(grads[0], rank, side, o["seed"]) for o in owns])
        low = project(grads, basis, side)
        normalized = adam_directions(owns, low, group, dtype)
        if group["scale_type"] == "tensor":
            length = torch.linalg.vector_norm
            above = length(normalized, dim=(1, 2), keepdim=True)
            factors = above / (length(low, dim=(1, 2), keepdim=True) + 1e-8)
        else:
            factors = channel_factors(normalized, low, side)
        root = math.sqrt(group["scale"])
        front = root if group["scale_front"] or not group["limiter"] else 1.0
        grads *= factors * front
        if group["limiter"]:
            guard, after = group["compat"] == "none", 1.0 if group["scale_front"] else root
            limit_growth(owns, grads, guard=guard, factor=after)
        return grads


class ApolloMini(Apollo):
    """APOLLO-Mini: rank 1, one scale per matrix (docs/methods/projected.md); published: 128."""

    declared = (AdamWOptimizer, ApolloMiniMethod)
