"""GoLore: GaLore whose subspaces become random late in training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from megalr.config.optimizers import AdamWOptimizer
from megalr.config.projected import GoLoreMethod
from megalr.errors import UserError
from megalr.optim.matrix import MatrixOptimizer, adam_directions, stacked
from megalr.optim.projection import (
    back_project,
    mixed_seed,
    project,
    random_orthonormal_basis,
    side_of,
)
from megalr.sharding.fragment import LogicalTensor


class GoLore(MatrixOptimizer):
    """GoLore (He et al. 2024, arXiv 2410.11289; docs/methods.md), in its optimizer form.

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
