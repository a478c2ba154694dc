"""APOLLO and APOLLO-Mini: the raw gradient, scaled as Adam scales it in a random subspace."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from megalr.config.base import Section
from megalr.config.optimizers import AdamWOptimizer
from megalr.config.projected import ApolloMethod, ApolloMiniMethod
from megalr.optim.galore import channel_factors
from megalr.optim.matrix import (
    MatrixOptimizer,
    adam_directions,
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
    """APOLLO-Mini: rank 1 and one scale per matrix (docs/methods.md); scale 128 as published."""

    declared = (AdamWOptimizer, ApolloMiniMethod)
