"""Muon: orthogonalized momentum for whole matrices, AdamW for everything else."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from megalr.config.optimizers import MuonOptimizer
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.sharding.exchange import MatrixUpdate
from megalr.sharding.fragment import LogicalTensor

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic a s + b s^3 + c s^5 that each step applies to the singular values s. It is
steepest at zero and takes them to between 0.7 and 1.2 in five steps, not to one exactly."""
GRAM_ROUNDS = (2, 3)
"""Steps of the Gram form between two products with X: its rounding errors grow with every step."""


class Muon(ShardedOptimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are all set to about one.

    For each logical matrix of a group with ``use_muon``: M <- momentum * M + (1 - momentum) G,
    U = NS5((1 - momentum) G + momentum M) * sqrt(max(1, m / n)),
    W <- (1 - lr * weight_decay) W - lr U. Other groups: AdamW with learning rate
    lr * ``adam_lr_ratio``. State: m n elements per matrix, on its owner; two moments elsewhere.

    NS5 is :func:`orthogonalized`. The gradient is clipped before, by the
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
    ) -> MatrixUpdate | None:
        state, lr = self.state[parameter], group["lr"]
        state["step"] = state.get("step", 0) + 1
        if not group["use_muon"]:
            self._adamw(parameter, flat, grad, group)
            return None

        def move(weights: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
            if weights:
                torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-lr)

        return MatrixUpdate(
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


def orthogonalized(matrix: torch.Tensor, method: str) -> torch.Tensor:
    """U V^T of ``matrix`` = U S V^T (m, n), approximately: S becomes values near one.

    ``standard`` iterates on the matrix itself, in bf16. ``gram`` iterates on the small Gram matrix
    X X^T, which needs fewer operations the further m and n are apart, in fp16 (fp32 on a CPU
    without fp16 arithmetic). Both give the same polynomial of the singular values; the dtype
    returned is the one of the iteration.

    Sources: Jordan et al. 2024 (standard), tridao.me/blog/2026/gram-newton-schulz (gram). The
    order of operations is that of DeepSpeed's Muon, so that results agree bitwise.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    dtype = torch.bfloat16 if method == "standard" else _gram_dtype(matrix.device)
    x = matrix.to(dtype) if method == "standard" else matrix
    x = x.mT if tall else x
    # The Gram form divides before the cast: fp16 ends at 65504.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    if method == "gram" and x.shape[0] < x.shape[1]:
        return _gram_iteration(x, tall)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _gram_iteration(x: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The iteration for X (s, l), s < l: the polynomial Q (s, s) is built up from R = X X^T.

    Returns Q X, or its transpose.
    """
    a, b, c = COEFFICIENTS
    for i, steps in enumerate(GRAM_ROUNDS):
        r = x @ x.mT
        z = b * r + c * r @ r
        q = z.clone()
        q.diagonal().add_(a)
        for _ in range(steps - 1):
            rz = a * r + z @ r
            r = a * rz + z @ rz
            z = b * r + c * r @ r
            q = a * q + z @ q
        if transposed and i == len(GRAM_ROUNDS) - 1:
            return x.mT @ q.mT
        x = q @ x
    return x


def _gram_dtype(device: torch.device) -> torch.dtype:
    """fp16, whose rounding is finer than bf16's; fp32 on a CPU that does not compute in fp16."""
    if device.type != "cpu":
        return torch.float16
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return torch.float16 if supported is not None and supported() else torch.float32


def muon_update(
    grad: torch.Tensor, momentum: torch.Tensor, beta: float, method: str
) -> torch.Tensor:
    """Muon's update of one matrix (m, n), with Nesterov momentum.

    M <- beta M + (1 - beta) G in place in ``momentum``;
    U = orthogonalized((1 - beta) G + beta M) * sqrt(max(1, m / n)), of the gradient's dtype.
    A gradient that is not finite leaves the momentum as it is and is returned as not finite.
    ``grad`` is overwritten.
    """
    finite = torch.isfinite(grad).all()  # stays on the device
    momentum.copy_(torch.where(finite, momentum.lerp(grad, 1 - beta), momentum))
    blend = grad.lerp_(momentum, beta)
    rows, columns = grad.shape
    update = orthogonalized(blend, method)
    update *= math.sqrt(rows / columns) if rows > columns else 1.0
    return torch.where(finite, update.to(grad.dtype), blend)
