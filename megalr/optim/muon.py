"""Muon, NorMuon and Dion2: orthogonalized momentum for whole matrices, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from megalr.config.base import Section
from megalr.config.optimizers import MuonOptimizer, NorMuonOptimizer
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.matrix import of_equal_shape
from megalr.optim.sharded_optimizer import ShardedOptimizer, scalar_dtype
from megalr.sharding.exchange import Change, Item, MatrixUpdate, Slices, add_changes
from megalr.sharding.fragment import Cut
from megalr.sharding.workers import agreed, completed, from_workers, share, to_workers

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic a s + b s^3 + c s^5 that each step applies to the singular values s. It is
steepest at zero and takes them to between 0.7 and 1.2 in five steps, not to one exactly."""
GRAM_ROUNDS = (2, 3)
"""Steps of the Gram form between two products with X: its rounding errors grow with every step."""
ROW_EPS = 1e-8
"""NorMuon's, added to the root of a row's second moment."""


class Muon(ShardedOptimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are all set to about one.

    For each logical matrix of a group with ``use_muon``: M <- momentum * M + (1 - momentum) G,
    U = NS5((1 - momentum) G + momentum M) * sqrt(max(1, m / n)),
    W <- (1 - lr * weight_decay) W - lr U. Other groups: AdamW with learning rate
    lr * ``adam_lr_ratio``. State: m n elements per matrix, on its owner; two moments elsewhere.

    NS5 is :func:`orthogonalized`. The gradient is clipped before, by the
    global norm, and matrices stacked in one parameter are orthogonalized one by one. Those of equal
    shape go through one batched product, as many at a time as 32 M elements hold.

    With ``fraction`` below 1 NS5 gets the rows (columns, if they are fewer) of M that
    :func:`largest_slices` chooses, without Nesterov's blend, and U is zero elsewhere.

    Under tensor parallelism a rank keeps M of its part of a matrix, and m and n are those of the
    whole one. The ranks share the matrices that they cut (:mod:`megalr.sharding.workers`).
    """

    declared: ClassVar[tuple[type[Section], ...]] = (MuonOptimizer,)
    marks: ClassVar[dict[str, Any]] = {"use_muon": False}
    matrix_elements = ("momentum_buffer",)
    nesterov: ClassVar[bool] = True
    by_rows: ClassVar[bool] = False
    """Whether ``fraction`` always chooses rows."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for parameter in group["params"]:
            for tensor in self.layout(parameter).tensors:
                if group["use_muon"] and len(tensor.shape) != 2:
                    kind = type(self).__name__
                    raise UserError(
                        f"{kind} needs matrices; {tensor.name} has shape {tensor.shape}"
                    )

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
            lr_of_adam, dtype = lr * group["adam_lr_ratio"], self._moment_dtype(parameter)
            adam_h.adamw_flat(flat, grad, state, group, lr_of_adam, dtype)
            return None

        def move(weights: list[torch.Tensor], changes: list[Change]) -> None:
            if weights and group["weight_decay"] > 0:
                torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            add_changes(weights, changes)

        return MatrixUpdate(
            self.layout(parameter),
            flat,
            grad,
            lambda items: self._whole(items, group),
            move,
            together=id(group),
            worked_on=group["fraction"],
        )

    def _whole(self, items: list[Item], group: dict[str, Any]) -> list[Change]:
        """-lr U of whole matrices of a group."""
        homes = {t.name: p for p in group["params"] for t in self.layout(p).tensors}
        owns, grads = [], []
        for tensor, grad in items:
            home = homes[tensor.name]
            own = self.state[home].setdefault("matrices", {}).setdefault(tensor.name, {})
            grad = grad.to(self._moment_dtype(home))
            if "momentum_buffer" not in own:
                own["momentum_buffer"] = torch.zeros_like(grad)
            owns.append(own)
            grads.append(grad)
        found: dict[int, Change] = {}
        for cut, indices in _alike(items, grads):
            chosen, dtype = [grads[i] for i in indices], items[indices[0]][1].dtype
            batch = self._rule([owns[i] for i in indices], chosen, group, cut, dtype)
            found.update(zip(indices, batch, strict=True))
        return [found[i] for i in range(len(items))]

    def _rule(
        self,
        owns: list[dict[str, Any]],
        grads: list[torch.Tensor],
        group: dict[str, Any],
        cut: Cut,
        dtype: torch.dtype,
    ) -> Sequence[Change]:
        """-lr U (m, n) in ``dtype``, of b gradients of one shape, parts of matrices cut alike.

        A gradient that is not finite leaves the state as it is, and its U is not finite.
        """
        momenta = [own["momentum_buffer"] for own in owns]
        finite = agreed(all_finite(grads), cut)  # stays on the device
        places, (m, n) = None, cut.whole_shape(grads[0].shape)
        side = 0 if self.by_rows or m <= n else 1
        if group["fraction"] < 1:
            batch, places = largest_slices(momenta, grads, finite, group, side, cut)
        else:
            batch = to_workers(self._direction(momenta, grads, finite, group["momentum"]), cut)
        update = orthogonalized(batch, group["ns_method"])
        del batch  # so that what follows needs no more memory than the iteration
        update = self._normalized(owns, update, finite, places, group, cut)
        factor = -group["lr"] * math.sqrt(max(1.0, m / n))
        factors = _if_finite(finite, factor, torch.nan, scalar_dtype(grads[0].dtype))
        if places is not None and cut.ranks.size == 1:
            moved = (update * factors).to(dtype)
            parts = zip(places.unbind(), moved.unbind(), strict=True)
            return [Slices((m, n), side, *part) for part in parts]
        if places is not None:
            index = places[:, :, None] if side == 0 else places[:, None, :]
            whole = update.new_zeros(len(update), m, n)
            update = whole.scatter_(side + 1, index.expand_as(update), update)
        return (from_workers(update, cut, len(grads)) * factors).to(dtype).unbind()

    def _direction(
        self,
        momenta: list[torch.Tensor],
        grads: list[torch.Tensor],
        finite: torch.Tensor,
        beta: float,
    ) -> torch.Tensor:
        """What is orthogonalized, (b, m, n), after the momenta moved on: Nesterov's blend."""
        # Where a gradient is not finite, the momentum stands for it: M <- M.
        blends = [torch.where(*x) for x in zip(finite.unbind(), grads, momenta, strict=True)]
        torch._foreach_lerp_(momenta, blends, 1 - beta)
        if self.nesterov:
            torch._foreach_lerp_(blends, momenta, beta)
        return torch.stack(blends if self.nesterov else momenta)

    def _normalized(
        self,
        owns: list[dict[str, Any]],
        update: torch.Tensor,
        finite: torch.Tensor,
        places: torch.Tensor | None,
        group: dict[str, Any],
        cut: Cut,
    ) -> torch.Tensor:
        """The orthogonalized matrices or, at the rows ``places`` (c, k), parts (c, k, n) of them,
        as they enter the weights but for a factor; here as they are. They are whole, and those that
        this rank works on; ``owns`` and ``finite`` are of all b."""
        return update


class NorMuon(Muon):
    """NorMuon (Li et al. 2025, arXiv 2510.05491; in the form of the authors' code).

    M <- momentum * M + (1 - momentum) G; O = NS5(M), without Nesterov's blend; for every row
    v <- muon_beta2 v + (1 - muon_beta2) mean(O * O); O' = O / (sqrt(v) + 1e-8), rescaled to the
    Frobenius norm of O; then as Muon, with U = O' sqrt(max(1, m / n)). With ``fraction`` below 1
    that happens to the chosen rows alone (NorDion2). State: m n + m elements per matrix; all m on
    every rank that holds a part of it.
    """

    declared = (NorMuonOptimizer,)
    nesterov, by_rows = False, True

    def _normalized(
        self,
        owns: list[dict[str, Any]],
        update: torch.Tensor,
        finite: torch.Tensor,
        places: torch.Tensor | None,
        group: dict[str, Any],
        cut: Cut,
    ) -> torch.Tensor:
        momentum = owns[0]["momentum_buffer"]
        dtype, mine = scalar_dtype(momentum.dtype), share(cut, len(owns))
        rows = cut.whole_shape(momentum.shape)[0]
        for own in owns:
            if "exp_avg_sq" not in own:
                own["exp_avg_sq"] = momentum.new_zeros(rows, dtype=dtype)
        whole = torch.stack([own["exp_avg_sq"] for own in owns])[mine]  # (c, m)
        update = update.to(dtype)
        second = whole if places is None else whole.gather(1, places)
        weight = _if_finite(finite[mine], 1 - group["muon_beta2"], 0.0, dtype)[:, 0]
        second = second.lerp(update.square().mean(dim=2), weight)
        whole = second if places is None else whole.scatter(1, places, second)
        whole = completed(whole, cut, 0, mine, len(owns))
        torch._foreach_copy_([own["exp_avg_sq"] for own in owns], whole.unbind())
        norm = torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True)
        update = update / (second.sqrt() + ROW_EPS)[:, :, None]
        changed = torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True)
        return update.mul_(norm / changed.clamp_min(ROW_EPS))


def _alike(items: list[Item], grads: list[torch.Tensor]) -> list[tuple[Cut, list[int]]]:
    """Indices of the matrices that can be stacked and are cut alike."""
    batches: list[tuple[Cut, list[int]]] = []
    for indices in of_equal_shape(grads):
        by_cut: dict[Cut, list[int]] = {}
        for index in indices:
            by_cut.setdefault(items[index][0].cut, []).append(index)
        batches += by_cut.items()
    return batches


def all_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether all elements of each tensor are finite, (b,)."""
    return torch.stack(torch._foreach_norm(tensors, torch.inf)).isfinite()


def _if_finite(
    finite: torch.Tensor, value: float, otherwise: float, dtype: torch.dtype
) -> torch.Tensor:
    """A factor (b, 1, 1) for each matrix of a batch."""
    full = torch.full_like(finite, value, dtype=dtype)
    return torch.where(finite, full, otherwise)[:, None, None]


def largest_slices(
    momenta: list[torch.Tensor],
    grads: list[torch.Tensor],
    finite: torch.Tensor,
    group: dict[str, Any],
    side: int,
    cut: Cut,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dion2's choice (Ahn et al. 2025, arXiv 2512.16928): rows (``side`` 0) or columns (1) of M.

    M <- M + G; the share ``fraction`` (rounded up) of the slices, those with the largest sums of
    magnitudes, is copied out, and decays by ``momentum`` in M; the others wait as they are.
    Returns them, (c, k, n) or (c, m, k), and their indices in ascending order, (c, k), of the c
    matrices that this rank works on. Slices of whole matrices are compared, also where M is a part.
    """
    zero = grads[0].new_zeros(())
    for momentum, ok, grad in zip(momenta, finite.unbind(), grads, strict=True):
        momentum.add_(torch.where(ok, grad, zero))  # one by one: a batch may be large
    sums = torch.stack([torch.linalg.vector_norm(m, ord=1, dim=1 - side) for m in momenta])
    size = cut.whole_shape(momenta[0].shape)[side]
    first = cut.ranks.rank * sums.shape[1] if size > sums.shape[1] else 0
    sums = completed(sums, cut, 1, slice(first, first + sums.shape[1]), size)
    count = math.ceil(group["fraction"] * size)
    places = sums.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    if cut.ranks.size > 1:
        return _slices_of_parts(
            momenta, places, _if_finite(finite, group["momentum"], 1.0, sums.dtype), side, cut
        )
    chosen = torch.stack(
        [m.index_select(side, at) for m, at in zip(momenta, places.unbind(), strict=True)]
    )
    decayed = chosen * _if_finite(finite, group["momentum"], 1.0, chosen.dtype)
    for m, at, part in zip(momenta, places.unbind(), decayed.unbind(), strict=True):
        m.index_copy_(side, at, part)
    return chosen, places


def _slices_of_parts(
    momenta: list[torch.Tensor], places: torch.Tensor, decay: torch.Tensor, side: int, cut: Cut
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`largest_slices` returns where the momenta are parts: a rank may hold few of the
    slices or many, so all of them go to the workers."""
    whole, mine = to_workers(torch.stack(momenta), cut), places[share(cut, len(momenta))]
    index = mine[:, :, None] if side == 0 else mine[:, None, :]
    chosen = torch.take_along_dim(whole, index, dim=side + 1)
    size = whole.shape[side + 1]
    factors = decay.new_ones(len(momenta), size).scatter_(
        1, places, decay[:, 0].expand_as(places).contiguous()
    )
    if cut.dim == side:
        factors = cut.part(factors, 1)
    torch._foreach_mul_(momenta, list(factors.unsqueeze(2 - side).unbind()))
    return chosen, mine


def orthogonalized(matrices: torch.Tensor, method: str) -> torch.Tensor:
    """U V^T of a batch (b, m, n) of matrices U S V^T, approximately: S becomes values near one.

    A matrix is divided by its Frobenius norm + 1e-7; then S <- a S + b S^3 + c S^5, five times.
    ``standard`` iterates on the matrices themselves, in bf16. ``gram`` computes in fp16 (fp32 on a
    CPU without fp16 arithmetic) and iterates on the small Gram matrices X X^T where that needs
    fewer operations, which is where one side is below 2/3 of the other: for sides s < l it takes
    8 s^2 l + 28 s^3 instead of 20 s^2 l + 10 s^3. Both give the same polynomial of the singular
    values; the dtype returned is the one of the iteration. The smaller side is multiplied: tall
    matrices are transposed. A sum of two terms is rounded once, where it is made together with a
    product.

    Sources: Jordan et al. 2024 (standard), tridao.me/blog/2026/gram-newton-schulz (gram).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    dtype = torch.bfloat16 if method == "standard" else _gram_dtype(matrices.device)
    x = matrices.to(dtype) if method == "standard" else matrices
    x = x.mT if tall else x
    # The Gram form divides before the cast: fp16 ends at 65504.
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    if method == "gram" and 3 * x.shape[1] < 2 * x.shape[2]:
        return _gram_iteration(x, tall)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return x.mT if tall else x


def _gram_iteration(x: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The iteration for X (b, s, l), s < l: the polynomial Q (b, s, s) is built up from R = X X^T.

    Returns Q X, or its transpose.
    """
    a, b, c = COEFFICIENTS
    for i, steps in enumerate(GRAM_ROUNDS):
        r = torch.bmm(x, x.mT)
        z = torch.baddbmm(r, r, r, beta=b, alpha=c)
        q = z.clone()
        q.diagonal(dim1=1, dim2=2).add_(a)
        for _ in range(steps - 1):
            rz = torch.baddbmm(r, z, r, beta=a)
            r = torch.baddbmm(rz, z, rz, beta=a)
            z = torch.baddbmm(r, r, r, beta=b, alpha=c)
            q = torch.baddbmm(q, z, q, beta=a)
        if transposed and i == len(GRAM_ROUNDS) - 1:
            return torch.bmm(x.mT, q.mT)
        x = torch.bmm(q, x)
    return x


def _gram_dtype(device: torch.device) -> torch.dtype:
    """fp16, whose rounding is finer than bf16's; fp32 on a CPU that does not compute in fp16."""
    if device.type != "cpu":
        return torch.float16
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return torch.float16 if supported is not None and supported() else torch.float32
