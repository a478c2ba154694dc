"""APOLLO and APOLLO-Mini: the raw gradient, scaled by what Adam does in a random subspace."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from megalr.errors import UserError
from megalr.optim.galore import channel_factors
from megalr.optim.matrix import (
    COMPAT,
    MatrixOptimizer,
    adam_directions,
    check_choice,
    limit_growth,
    stacked,
)
from megalr.optim.projection import gaussian_basis, next_seed, project, side_of
from megalr.sharding.fragment import LogicalTensor


class Apollo(MatrixOptimizer):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270; docs/methods.md).

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
        scale: float = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        proj: str = "random",
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
            "scale_type": scale_type,
            "scale_front": scale_front,
            "proj": proj,
            "proj_type": proj_type,
            "basis": basis,
            "stagger": stagger,
            "limiter": limiter,
            "compat": compat,
        }
        super().__init__(params, options, state_dtype, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("scale_type", group["scale_type"], ("channel", "tensor"))
        check_choice("proj", group["proj"], ("random", "svd"))
        check_choice("compat", group["compat"], COMPAT)
        if group["scale"] < 0:
            raise UserError(f"scale must be >= 0, got {group['scale']}")
        if side_of((1, 1), group["proj_type"]) == "full":
            raise UserError("APOLLO needs a one-sided projection: proj_type cannot be full")

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
    """APOLLO-Mini: rank 1 and one scale a matrix (docs/methods.md); scale 128 as published."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        scale: float = 128.0,
        scale_type: str = "tensor",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            scale=scale,
            scale_type=scale_type,
            **options,
        )
