"""GoLore: GaLore whose subspaces become random late in training."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

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

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        total_updates: int,
        rand_ratio: float = 0.8,
        kappa: float = 1.0,
        basis: str = "auto",
        stagger: bool = False,
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
            "total_updates": total_updates,
            "rand_ratio": rand_ratio,
            "kappa": kappa,
            "basis": basis,
            "stagger": stagger,
        }
        super().__init__(params, options, state_dtype, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 <= group["rand_ratio"] <= 1:
            raise UserError(
                f"rand_ratio must be in [0, 1], got {group['rand_ratio']}: it is the part of the "
                "run that uses singular vectors"
            )
        if group["total_updates"] < 1:
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
