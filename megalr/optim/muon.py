"""Muon: orthogonalized momentum for whole matrices, AdamW for everything else."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from megalr.config.optimizers import MuonOptimizer
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.base import ShardedOptimizer
from megalr.optim.orthogonal import muon_update
from megalr.sharding.exchange import update_matrices
from megalr.sharding.fragment import LogicalTensor


class Muon(ShardedOptimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are all set to about one.

    For each logical matrix of a group with ``use_muon``: M <- momentum * M + (1 - momentum) G,
    U = NS5((1 - momentum) G + momentum M) * sqrt(max(1, m / n)),
    W <- (1 - lr * weight_decay) W - lr U. Other groups: AdamW with learning rate
    lr * ``adam_lr_ratio``. State: m n elements per matrix, on its owner; two moments elsewhere.

    NS5 is :func:`megalr.optim.orthogonal.orthogonalized`. The gradient is clipped before, by the
    global norm, and matrices stacked in one parameter are orthogonalized one by one.
    """

    declared = (MuonOptimizer,)
    marks: ClassVar[dict[str, Any]] = {"use_muon": False}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for parameter in group["params"]:
            for tensor in self.layout(parameter).tensors:
                if group["use_muon"] and len(tensor.shape) != 2:
                    raise UserError(f"Muon needs matrices; {tensor.name} has shape {tensor.shape}")

    def _update(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        state, lr = self.state[parameter], group["lr"]
        state["step"] = state.get("step", 0) + 1
        if not group["use_muon"]:
            self._adamw(parameter, flat, grad, group)
            return

        def move(weights: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
            if weights:
                torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-lr)

        update_matrices(
            self.layout(parameter),
            flat,
            grad,
            lambda items: [self._orthogonalized(parameter, t, g, group) for t, g in items],
            move,
        )

    def _adamw(
        self, parameter: torch.Tensor, flat: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> None:
        """AdamW as in torch: eps outside the bias correction, decay first."""
        state, betas, lr = self.state[parameter], group["betas"], group["lr"]
        lr, step = lr * group["adam_lr_ratio"], state["step"]
        dtype = self._moment_dtype(parameter)
        (first,), (second,) = adam_h.advance_moments([state], [grad], betas, dtype)
        root = (second.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(group["eps"])
        flat.mul_(1 - lr * group["weight_decay"])
        flat.add_((first / root).to(flat.dtype), alpha=-lr / (1 - betas[0] ** step))

    def _orthogonalized(
        self,
        parameter: torch.Tensor,
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> torch.Tensor:
        own = self.state[parameter].setdefault("matrices", {}).setdefault(tensor.name, {})
        dtype = self._moment_dtype(parameter)
        if "momentum_buffer" not in own:
            own["momentum_buffer"] = torch.zeros_like(grad, dtype=dtype)
        return muon_update(
            grad.to(dtype, copy=True), own["momentum_buffer"], group["momentum"], group["ns_method"]
        )
