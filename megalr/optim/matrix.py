"""Base of the optimizers that look at whole matrices, whole or split over ZeRO's slices.

A parameter group with a ``rank`` is projected: each of its logical matrices gets the rule of the
subclass. A group whose ``rank`` is None gets plain ADAM-H elementwise, at the same learning rate,
as in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from megalr.optim import adam_h
from megalr.optim.projection import leading_bases, mixed_seed, refresh_due, side_of
from megalr.optim.sharded_optimizer import ShardedOptimizer, require_matrix
from megalr.sharding.exchange import Item, MatrixUpdate
from megalr.sharding.fragment import LogicalTensor


class MatrixOptimizer(ShardedOptimizer):
    """ADAM-H on low-rank images of whole matrices; subclasses give the rule of one matrix.

    ``rank`` (None: not projected) marks the groups of matrices.
    """

    marks: ClassVar[dict[str, Any]] = {"rank": None}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["rank"] is None:
            return
        for parameter in group["params"]:
            for tensor in self.layout(parameter).tensors:
                require_matrix(tensor, group["rank"])

    # -- one entry of param_groups -----------------------------------------------------------

    def _update(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> MatrixUpdate | None:
        state = self.state[parameter]
        # Projectors follow a count of their own: a momentum reset may restart Adam's counter.
        state["updates"] = state.get("updates", 0) + 1
        state["step"] = state.get("step", 0) + 1
        betas, lr = group["betas"], group["lr"]
        size = adam_h.step_size(lr, betas, state["step"])
        decay = lr * group["weight_decay"]
        if group["rank"] is None:
            dtype = self._moment_dtype(parameter)
            adam_h.update_flat(flat, grad, state, group, (size, decay), dtype)
            return None
        return MatrixUpdate(
            self.layout(parameter),
            flat,
            grad,
            lambda items: self._whole(parameter, items, group),
            lambda weights, updates: adam_h.apply_updates(weights, updates, size, decay),
        )

    def _whole(
        self, parameter: torch.Tensor, items: list[Item], group: dict[str, Any]
    ) -> list[torch.Tensor]:
        """U of whole matrices, after the projectors that are due were refreshed."""
        state = self.state[parameter]
        store, done = state.setdefault("matrices", {}), state["updates"] - 1
        ready, owns, grads = [], [], []
        for index, (tensor, grad) in enumerate(items):
            own = store.setdefault(tensor.name, {})
            due = refresh_due(done, group["update_proj_gap"], tensor.number, group["stagger"])
            if (not due and self._has_projector(own)) or self._refresh(
                own, tensor, grad, group, done
            ):
                ready.append(index)
                owns.append(own)
                grads.append(grad)
        updates = self._batched(owns, grads, group, self._moment_dtype(parameter))
        found = dict(zip(ready, updates, strict=True))
        return [
            found[i] if i in found else torch.zeros_like(grad) for i, (_, grad) in enumerate(items)
        ]

    def _batched(
        self,
        owns: list[dict[str, Any]],
        grads: list[torch.Tensor],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """The rule on matrices of one shape at a time: many small kernels become few large ones."""
        updates: dict[int, torch.Tensor] = {}
        for indices in of_equal_shape(grads):
            batch = torch.stack([grads[i] for i in indices])
            found = self._rule([owns[i] for i in indices], batch, group, dtype)
            updates.update(zip(indices, found.unbind(), strict=True))
        return [updates[i] for i in range(len(grads))]

    # -- given by subclasses ------------------------------------------------------------------

    def _has_projector(self, own: dict[str, Any]) -> bool:
        return "projector" in own

    def _refresh(
        self,
        own: dict[str, Any],
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        done: int,
    ) -> bool:
        """Renew the projector in ``own``; False when there is none (G is entirely zero).

        Here: the leading singular vectors of G on the side that ``proj_type`` names.
        """
        side = side_of(tensor.shape, group["proj_type"])
        return self._leading(own, tensor, grad, group, done, side)

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: torch.Tensor,
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """U (b, m, n) of the gradients (b, m, n) of b matrices with the states ``owns``.

        A weight moves by -step_size * U. ``grads`` may be overwritten.
        """
        raise NotImplementedError

    def _leading(
        self,
        own: dict[str, Any],
        tensor: LogicalTensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        done: int,
        side: str,
    ) -> bool:
        """Store the leading singular bases of G in ``own``: ``projector`` (and ``projector2``)."""
        if not bool(grad.any()):
            return self._has_projector(own)
        start = tuple(own[key] for key in ("projector", "projector2") if key in own) or None
        seed = mixed_seed(self.seed, tensor.number, done)
        found = leading_bases(grad, group["rank"], side, group["basis"], start, seed)
        for key, basis in zip(("projector", "projector2"), found, strict=False):
            own[key] = basis.to(self.state_dtype or grad.dtype)
        return True


def of_equal_shape(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of the tensors that can be stacked: of one shape and dtype, on one device."""
    found: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
    return list(found.values())


def stacked(owns: list[dict[str, Any]], key: str, dtype: torch.dtype) -> torch.Tensor:
    """One state of several matrices of equal shape as a batch, in ``dtype``."""
    return torch.stack([own[key] for own in owns]).to(dtype)


def adam_directions(
    owns: list[dict[str, Any]], low: torch.Tensor, group: dict[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    """N of ADAM-H on a batch of projected gradients, in their dtype."""
    found = adam_h.directions(owns, low.unbind(), group["betas"], group["eps"], dtype)
    return torch.stack(found).to(low.dtype)


def limit_growth(
    owns: list[dict[str, Any]],
    updates: torch.Tensor,
    guard: bool,
    gamma: float = 1.01,
    factor: float = 1.0,
) -> torch.Tensor:
    """Fira's norm-growth limiter, in place: |U_t| <= gamma |U_{t-1}|; then U <- factor U.

    For each matrix of the batch (b, m, n), with p = |U_{t-1}| kept as ``update_norm``:
    l = max(|U| / (p + 1e-8), gamma) / gamma; U <- U / l; p <- |U| / l. The first call only
    remembers the norm. With ``guard`` a remembered norm of zero counts as a first call: as
    published it would hold the tensor at norm 1e-8 and let it grow by 1 % per update.
    """
    dtype = torch.float64 if updates.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(updates, dim=(1, 2), dtype=dtype)
    new = ["update_norm" not in own for own in owns]
    previous = torch.stack([norms[i] if new[i] else o["update_norm"] for i, o in enumerate(owns)])
    ratios = (norms / (previous + 1e-8)).clamp_min(gamma) / gamma
    first = torch.tensor(new, device=norms.device)
    if guard:
        first |= previous == 0
    ratios = torch.where(first, torch.ones_like(ratios), ratios)
    for own, norm in zip(owns, (norms / ratios).unbind(), strict=True):
        own["update_norm"] = norm.clone()
    return updates.mul_((factor / ratios).to(updates.dtype)[:, None, None])
