"""LORO: low-rank training by Riemannian steps on the manifold of rank-r matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from megalr.config.optimizers import AdamWOptimizer
from megalr.config.projected import LOROMethod
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.options import check_options, with_defaults
from megalr.optim.sharded_optimizer import ShardedOptimizer, flat_grad, flat_part
from megalr.sharding.exchange import buckets, from_owner, to_owner
from megalr.sharding.fragment import FlatLayout, LogicalTensor

OWN_OPTIONS = ("exact_every", "refresh_every", "refresh", "lr_scaler")
Located = tuple[torch.Tensor, FlatLayout, LogicalTensor]
"""A logical tensor, the entry of ``param_groups`` that holds it, and that entry's layout."""


class LORO(ShardedOptimizer):
    """LORO (Mo et al. 2025, ICLR; the authors' code; docs/methods/projected.md) for W = B A.

    Pairs are the logical tensors named ``X.B`` (m, r) and ``X.A`` (r, n). With ADAM-H directions
    d_B, d_A:

    * approximate update: B <- B - step_size * zeta * d_B and likewise A, zeta = r / hidden_size
      (``lr_scaler`` -1) or ``lr_scaler``; decay by step_size * weight_decay * factor;
    * every ``exact_every`` updates (K), an exact one: the Riemannian step and its retraction to
      rank r through a 2r x 2r SVD, which returns balanced factors (no zeta, no decay);
    * every ``refresh_every`` updates (None: K) m, v <- 0 and the counter restarts, for ``refresh``
      all tensors, the factors, or none.

    Tensors outside pairs get plain ADAM-H at the same learning rate. State: 2 (m + n) r elements.
    """

    declared = (AdamWOptimizer,)
    marks: ClassVar[dict[str, Any]] = {"eps": LOROMethod.model_fields["eps"].default}

    def __init__(self, params: ParamsT, *, hidden_size: int, **options: Any) -> None:
        # The method's own options hold for all pairs; groups have those of Adam.
        own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
        own = with_defaults((LOROMethod,), {}, own)
        check_options((LOROMethod,), own)
        self.hidden_size, self.lr_scaler = hidden_size, own["lr_scaler"]
        self.exact_every, self.refresh = own["exact_every"], own["refresh"]
        self.refresh_every = own["refresh_every"] or self.exact_every
        super().__init__(params, **options)
        if not self._pairs():
            raise UserError(
                "LORO found no factors among its parameters: give it those of a factorized model "
                "(after fully_shard: as megalr.split_parameters returns them)"
            )

    def _pairs(self) -> list[tuple[Located, Located]]:
        return located_pairs(self, self.param_groups)

    def _step_groups(self) -> None:
        entries = list(self._entries())
        pairs = self._pairs() if entries else []
        rank_of = {t.name: b[2].shape[1] for b, a in pairs for t in (b[2], a[2])}
        directions: dict[torch.Tensor, torch.Tensor] = {}
        sizes: dict[torch.Tensor, float] = {}
        exact = False
        for group, parameter in entries:
            state = self.state[parameter]
            state["updates"] = state.get("updates", 0) + 1
            state["step"] = state.get("step", 0) + 1
            exact = state["updates"] % self.exact_every == 0
            sizes[parameter] = adam_h.step_size(group["lr"], group["betas"], state["step"])
            dtype = self._moment_dtype(parameter)
            found = adam_h.direction(
                state, flat_grad(parameter), group["betas"], group["eps"], dtype
            )
            directions[parameter] = found.to(parameter.dtype)
            self._step_entry(
                parameter, directions[parameter], sizes[parameter], group, rank_of, exact
            )
        if exact and pairs:
            self._exact(pairs, directions, sizes)
        self._refresh_moments(directions, rank_of)

    def _step_entry(
        self,
        parameter: torch.Tensor,
        update: torch.Tensor,
        size: float,
        group: dict[str, Any],
        rank_of: dict[str, int],
        exact: bool,
    ) -> None:
        """Plain and approximate updates of the tensors in one entry of ``param_groups``."""
        flat = flat_part(parameter)
        for tensor, fragment in self.layout(parameter).local:
            weight, part = fragment.of(flat), fragment.of(update)
            rank = rank_of.get(tensor.name)
            if rank is None:
                adam_h.apply_update(weight, part, size, group["lr"] * group["weight_decay"])
            elif not exact:
                zeta = rank / self.hidden_size if self.lr_scaler == -1 else self.lr_scaler
                decay = size * group["weight_decay"]
                adam_h.apply_update(weight, part, size * zeta, decay)

    def _exact(
        self,
        pairs: list[tuple[Located, Located]],
        directions: dict[torch.Tensor, torch.Tensor],
        sizes: dict[torch.Tensor, float],
    ) -> None:
        """The exact update of all pairs: factors and directions to the owner of B, and back."""
        ranks = pairs[0][0][1].ranks
        like = flat_part(pairs[0][0][0])
        for bucket in buckets(pairs, lambda pair: pair[0][2].numel):
            members = []
            for (b_entry, _, b), (a_entry, _, a) in bucket:
                members += [(b_entry, b), (a_entry, replace(a, owner=b.owner))]
            flats = [(tensor, flat_part(entry)) for entry, tensor in members]
            factors = to_owner(ranks, flats, like)
            steps = to_owner(ranks, [(t, directions[entry]) for entry, t in members], like)
            updated: dict[str, torch.Tensor] = {}
            for (b_entry, _, b), (_, _, a) in bucket:
                if b.name in factors:
                    updated[b.name], updated[a.name] = exact_step(
                        factors[b.name],
                        factors[a.name],
                        steps[b.name],
                        steps[a.name],
                        sizes[b_entry],
                    )
            parts = from_owner(ranks, [tensor for tensor, _ in flats], updated, like)
            for tensor, flat in flats:
                fragment = tensor.on(ranks.rank)
                if fragment is not None:
                    fragment.of(flat).copy_(parts[tensor.name])

    def _refresh_moments(self, stepped: Iterable[torch.Tensor], rank_of: dict[str, int]) -> None:
        for parameter in stepped:
            state = self.state[parameter]
            factors = any(t.name in rank_of for t in self.layout(parameter).tensors)
            chosen = self.refresh == "all" or (self.refresh == "factors" and factors)
            if chosen and state["updates"] % self.refresh_every == 0:
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
                state["step"] = 0


def located_pairs(
    optimizer: ShardedOptimizer, groups: Iterable[dict[str, Any]]
) -> list[tuple[Located, Located]]:
    """(B, A) of every pair among the entries that parameter groups of an optimizer show now.

    Raises:
        UserError: a B without its A.
    """
    found: dict[str, Located] = {
        tensor.name: (parameter, optimizer.layout(parameter), tensor)
        for group in groups
        for parameter in group["params"]
        for tensor in optimizer.layout(parameter).tensors
    }
    pairs = []
    for name, located in found.items():
        if name.endswith(".B"):
            partner = found.get(name[:-1] + "A")
            if partner is None:
                raise UserError(
                    f"{type(optimizer).__name__} found {name} without {name[:-1]}A in the same "
                    "parameter group: keep both factors in one group (under ZeRO 3 raise "
                    "sub_group_size)"
                )
            pairs.append((located, partner))
    return pairs


def exact_step(
    b: torch.Tensor, a: torch.Tensor, d_b: torch.Tensor, d_a: torch.Tensor, size: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Riemannian step of W = B A along (d_B, d_A) with length ``size``, retracted to rank r.

    b, d_b (m, r); a, d_a (r, n). With B = U X and A^T = V Y (QR), P = d_B Y^-1, Q = X^-T d_A:
    the new W is the best rank-r approximation of [U Q2] S [V Q1]^T with
    S = [[X Y^T - size Q V, -size K1^T], [-size K2, 0]], where Q1 K1 and Q2 K2 are QR of the parts
    of Q^T and P outside V and U. Returned balanced, in the input's dtype; computed in fp32 or
    fp64. Zero rows of B and columns of A (padding) that have no direction stay exactly zero.

    Where X or Y is singular to rounding (a direction of B or A is zero) P or Q do not exist: such a
    pair takes the plain step ``b - size d_b``, ``a - size d_a``.
    """
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    b64, a64, db, da = (x.to(dtype) for x in (b, a, d_b, d_a))
    rank = b.shape[1]
    u, x = torch.linalg.qr(b64)
    v, y = torch.linalg.qr(a64.mT)
    diagonals = torch.stack([x.diagonal(), y.diagonal()]).abs()  # (2, r)
    least = rank * torch.finfo(dtype).eps * diagonals.amax(dim=1)
    if bool((diagonals.amin(dim=1) <= least).any()):
        return b - size * d_b.to(b.dtype), a - size * d_a.to(a.dtype)
    p = torch.linalg.solve_triangular(y, db, upper=True, left=False)
    q = torch.linalg.solve_triangular(x.mT, da, upper=False)
    q_inside = q @ v
    q1, k1 = torch.linalg.qr(q.mT - v @ q_inside.mT)
    q2, k2 = torch.linalg.qr(p - u @ (u.mT @ p))
    top = torch.cat([x @ y.mT - size * q_inside, -size * k1.mT], dim=1)
    bottom = torch.cat([-size * k2, torch.zeros_like(k2)], dim=1)
    left, values, right = torch.linalg.svd(torch.cat([top, bottom]))
    root = values[:rank].sqrt()
    new_b = torch.cat([u, q2], dim=1) @ (left[:, :rank] * root)
    new_a = ((torch.cat([v, q1], dim=1) @ right[:rank].mT) * root).mT
    live_rows = (b64.ne(0) | db.ne(0)).any(dim=1, keepdim=True)
    live_columns = (a64.ne(0) | da.ne(0)).any(dim=0, keepdim=True)
    return (new_b * live_rows).to(b.dtype), (new_a * live_columns).to(a.dtype)
