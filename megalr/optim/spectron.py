"""Spectron: orthogonalized momentum for pairs of factors, scaled by their spectral norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from megalr.config.optimizers import SpectronOptimizer
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.loro import Located, located_pairs
from megalr.optim.matrix import stacked
from megalr.optim.muon import orthogonalized
from megalr.optim.sharded_optimizer import ShardedOptimizer, flat_grad, flat_part, scalar_dtype
from megalr.sharding.exchange import buckets, from_owner, reduce_over_ranks, to_owner
from megalr.sharding.fragment import Cut, Ranks
from megalr.sharding.workers import from_workers, to_workers

Pair = tuple[Located, Located]
"""B and A."""
ALONE = Ranks()


class Spectron(ShardedOptimizer):
    """Spectron (Janson et al. 2026, arXiv 2602.12429, algorithms 1 and 3) for W = B A.

    Pairs are the logical tensors named ``X.B`` (m, r) and ``X.A`` (r, n) of groups with
    ``use_spectron``. For each factor M <- momentum * M + (1 - momentum) G and O = NS5(M); with the
    largest singular values s_B and s_A, rho = lr / (s_B + s_A + 1) and
    B <- (1 - lr * weight_decay) B - rho O_B, likewise A. Without decay B A then changes by at most
    lr times the largest singular value of O (at most 1.21), in spectral norm, for lr <= 1. Other
    groups: AdamW with learning rate lr * ``adam_lr_ratio``.

    s is found by :func:`power_step`. State: (m + n) r elements for each pair, and 2 r numbers on
    the owner of B, where both factors and momenta meet; pairs of equal shapes are stacked.

    Under tensor parallelism, which cuts a factor along its long side or not at all, s and O are
    those of the whole factors; the ranks share the orthogonalizations of those that they cut.
    """

    declared = (SpectronOptimizer,)
    marks: ClassVar[dict[str, Any]] = {"use_spectron": False}

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, **options)
        if not self._pairs():
            raise UserError(
                "Spectron found no factors in groups with use_spectron: give it those of a "
                "factorized model (after fully_shard: as megalr.split_parameters returns them)"
            )

    def _pairs(self) -> list[Pair]:
        groups = [group for group in self.param_groups if group["use_spectron"]]
        pairs = [pair for group in groups for pair in located_pairs(self, [group])]
        paired = {located[2].name for pair in pairs for located in pair}
        for group in groups:
            for parameter in group["params"]:
                for tensor in self.layout(parameter).tensors:
                    if tensor.name not in paired:
                        raise UserError(
                            f"Spectron needs pairs of factors; {tensor.name} of shape "
                            f"{tensor.shape} is none: put it into a group without use_spectron"
                        )
        return pairs

    def _step_groups(self) -> None:
        stepped: dict[torch.Tensor, dict[str, Any]] = {}
        for group, parameter in self._entries():
            state, flat, grad = self.state[parameter], flat_part(parameter), flat_grad(parameter)
            dtype = self._moment_dtype(parameter)
            state["step"] = state.get("step", 0) + 1
            if not group["use_spectron"]:
                lr = group["lr"] * group["adam_lr_ratio"]
                adam_h.adamw_flat(flat, grad, state, group, lr, dtype)
                continue
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(flat, dtype=dtype)
            state["momentum_buffer"].lerp_(grad.to(dtype), 1 - group["momentum"])
            stepped[parameter] = group
        pairs = self._pairs() if stepped else []
        pairs = [pair for pair in pairs if pair[0][0] in stepped and pair[1][0] in stepped]
        # So that pairs of equal shapes share a bucket, which is stacked.
        pairs.sort(key=lambda pair: (pair[0][2].shape, pair[1][2].shape))
        for bucket in buckets(pairs, _memory_of):
            self._step_pairs(bucket, stepped)

    def _step_pairs(self, pairs: list[Pair], group_of: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Factors and momenta of some pairs to the owner of B, and new factors back."""
        entry, layout, _ = pairs[0][0]
        ranks, like = layout.ranks, flat_part(entry)
        members = []
        for (b_entry, _, b), (a_entry, _, a) in pairs:
            members += [(b_entry, b), (a_entry, replace(a, owner=b.owner))]
        parts_of = {parameter: flat_part(parameter) for parameter, _ in members}
        flats = [(tensor, parts_of[parameter]) for parameter, tensor in members]
        moments = [(tensor, self.state[p]["momentum_buffer"]) for p, tensor in members]
        factors = to_owner(ranks, flats, like)
        momenta = to_owner(ranks, moments, moments[0][1])
        alike: dict[Any, list[Pair]] = {}
        for (b_entry, layout, b), a_located in pairs:
            if b.name in factors:
                a = a_located[2]
                key = (b.shape, a.shape, b.cut, a.cut, id(group_of[b_entry]))
                alike.setdefault(key, []).append(((b_entry, layout, b), a_located))
        for same in alike.values():
            self._update_alike(same, factors, momenta, group_of[same[0][0][0]])
        parts = from_owner(ranks, [tensor for tensor, _ in flats], factors, like)
        weights, new = [], []
        for tensor, flat in flats:
            fragment = tensor.on(ranks.rank)
            # A single rank has updated the weights themselves.
            if fragment is not None and not _same(fragment.of(flat), parts[tensor.name]):
                weights.append(fragment.of(flat))
                new.append(parts[tensor.name])
        if weights:
            torch._foreach_copy_(weights, new)

    def _update_alike(
        self,
        pairs: list[Pair],
        factors: dict[str, torch.Tensor],
        momenta: dict[str, torch.Tensor],
        group: dict[str, Any],
    ) -> None:
        """Update the factors of k pairs of equal shapes in place; one side at a time in memory."""
        dtype = scalar_dtype(momenta[pairs[0][0][2].name].dtype)
        rho = group["lr"] / (sum(self._norms(pairs, factors, dtype)) + 1)
        for side in (0, 1):
            names = [pair[side][2].name for pair in pairs]
            momentum = [momenta[name] for name in names]
            cut = pairs[0][side][2].cut
            _move([factors[name] for name in names], momentum, rho[:, None, None], group, cut)

    def _norms(
        self, pairs: list[Pair], factors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """The largest singular values of the factors B and of A, (k,) each."""
        owns = []
        for (b_entry, _, b), _ in pairs:
            own = self.state[b_entry].setdefault("matrices", {}).setdefault(b.name, {})
            for key in ("power_b", "power_a"):
                if key not in own:
                    own[key] = factors[b.name].new_zeros(b.shape[1], dtype=dtype)
            owns.append(own)
        norms = []
        for side, key in enumerate(("power_b", "power_a")):
            weight = torch.stack([factors[pair[side][2].name] for pair in pairs]).to(dtype)
            short = weight.mT if side == 0 else weight  # (k, r, m) or (k, r, n)
            ranks = pairs[0][side][2].cut.ranks
            norm, vectors = power_step(short, stacked(owns, key, dtype), ranks)
            torch._foreach_copy_([own[key] for own in owns], vectors.unbind())
            norms.append(norm)
        return norms


def _memory_of(pair: Pair) -> int:
    """Elements that a pair needs memory for: both factors where they are exchanged; else one at a
    time is worked on."""
    (_, layout, b), (_, _, a) = pair
    return b.numel + a.numel if layout.ranks.size > 1 else max(b.numel, a.numel)


def _move(
    weights: list[torch.Tensor],
    momenta: list[torch.Tensor],
    rho: torch.Tensor,
    group: dict[str, Any],
    cut: Cut,
) -> None:
    """W <- (1 - lr * weight_decay) W - rho O for k factors of one shape; rho (k, 1, 1)."""
    whole = to_workers(torch.stack(momenta), cut)
    moved = from_workers(orthogonalized(whole, group["ns_method"]), cut, len(weights))
    del whole
    stack = torch.stack(weights).to(rho.dtype)
    if group["weight_decay"] > 0:
        stack.mul_(1 - group["lr"] * group["weight_decay"])
    stack.sub_(rho * moved)
    torch._foreach_copy_(weights, stack.unbind())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a shape are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype


def power_step(
    matrices: torch.Tensor, vectors: torch.Tensor, ranks: Ranks = ALONE
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the power iteration for the largest singular values of X (k, r, l), r <= l.

    From u (k, r), the vectors of the step before: w = X'u / |X'u|, s = |X w|, u <- X w / s.
    Returns s (k,) and the new u. s is never above the largest singular value and never below the
    largest norm of a row: where |X'u| is below it, u is the unit vector of that row. So it is at
    the first step (u = 0) and where X was replaced (refactorization), without being told. X = 0
    gives s = 0 and u = 0. ``ranks`` hold equal parts of the columns; the results are the same on
    all of them.
    """
    image = torch.bmm(vectors[:, None], matrices)[:, 0]  # (k, l)
    parts = [torch.linalg.vector_norm(x, dim=2) for x in (matrices, image[:, None])]
    norms = _over(torch.cat(parts, dim=1), ranks)  # (k, r + 1)
    largest, at = norms[:, :-1].max(dim=1)
    longest = matrices[torch.arange(len(at), device=at.device), at]
    stale = norms[:, -1] < largest
    image = torch.where(stale[:, None], longest, image)
    tiny = torch.finfo(matrices.dtype).tiny
    image = image / torch.where(stale, largest, norms[:, -1]).clamp_min(tiny)[:, None]
    product = torch.bmm(matrices, image[:, :, None])[:, :, 0]  # (k, r)
    product = reduce_over_ranks(product, ranks, dist.ReduceOp.SUM)
    norm = torch.linalg.vector_norm(product, dim=1)
    return norm, product / norm.clamp_min(tiny)[:, None]


def _over(norms: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Norms of whole vectors from those of the parts that the ranks hold."""
    if ranks.size == 1:
        return norms
    return reduce_over_ranks(norms.square(), ranks, dist.ReduceOp.SUM).sqrt()
