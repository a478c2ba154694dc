"""Moment transport: moments of the factors, carried into the refactorized factors' basis.

With B' = B T and A' = T⁻¹ A the gradients change as g_B' = g_B T⁻ᵀ and g_A' = Tᵀ g_A. The first
moment m is linear in them and is carried exactly: m_B' = m_B T⁻ᵀ, m_A' = Tᵀ m_A. That is all for
the momentum of Muon, NorMuon and Spectron. Adam's second moment v holds squares only, and a product
of two gradients is estimated from their means. With R the map
that acts on m, R o R its entries squared, hats for moments without bias, elementwise otherwise:

    mu  = sign(m^) min(|m^|, sqrt(v^))
    m^' = R m^,      v^' = (R o R)(v^ - mu²) + (R mu)²

which is exact where R is diagonal or the gradients are constant, changes nothing where R is the
identity, and is never negative. Where v^ >= m^², as for a mean and a mean square over the same
gradients, mu is m^; the averages of Adam have different lengths, so v^ < m^² occurs. At last v is
raised to the least that any gradients with this m can leave, so that no step is larger than Adam
can make: m² <= (1 - beta1)² / ((1 - beta2) (1 - beta1² / beta2)) v.

NorMuon's second moment of a row stays as it is: the sum of squares of a row of U Vᵀ is an entry of
the diagonal of U Uᵀ. For m_B U Uᵀ is the projection on its column space, which T⁻ᵀ does not change;
for m_A, with r rows, it is the identity. (Newton-Schulz reaches U Vᵀ approximately.)

Directions whose singular value is zero get moments of zero. All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.errors import UserError
from megalr.layers.factors import FactorPair
from megalr.optim.muon import Muon
from megalr.optim.spectron import Spectron
from megalr.restarts.masters import Masters
from megalr.restarts.rounds import FactorRounds, Matrices

MOMENTS: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
MOMENTUM: tuple[str, ...] = ("momentum_buffer",)
PIECE = 1 << 20
"""Elements that are carried at a time; six float64 tensors of this size are alive."""


@dataclass(frozen=True)
class AdamBias:
    """Bias corrections 1 - beta^t of both moments, and the least of v / m² (0: none)."""

    first: float
    second: float
    least: float

    @classmethod
    def after(cls, betas: Sequence[float], updates: int) -> AdamBias:
        """After ``updates`` >= 1 updates."""
        beta1, beta2 = (float(beta) for beta in betas)
        ratio = beta1 * beta1 / beta2 if beta2 else math.inf
        least = max(0.0, (1 - beta2) * (1 - ratio) / (1 - beta1) ** 2)
        return cls(1 - beta1**updates, 1 - beta2**updates, least)


@torch.no_grad()
def carry_moments(first: Tensor, second: Tensor, right: Tensor, bias: AdamBias) -> None:
    """Replace m, v (rows, r) of gradients g by those of ``g @ right``, in place.

    ``right`` is (r, r) float64: T⁻ᵀ for B; T for A, whose moments are given transposed.
    """
    squares = right.square()
    rows = max(1, PIECE // right.shape[0])
    for raw_m, raw_v in zip(first.split(rows), second.split(rows), strict=True):
        m, v = raw_m.double() / bias.first, raw_v.double() / bias.second
        limit = v.sqrt()
        mean = m.clamp(-limit, limit)
        v = (v - mean.square()).clamp(min=0) @ squares + (mean @ right).square()
        m = m @ right * bias.first
        raw_m.copy_(m)
        raw_v.copy_(torch.maximum(v * bias.second, m.square() * bias.least))


@torch.no_grad()
def carry_momentum(momentum: Tensor, right: Tensor) -> None:
    """Replace a momentum (rows, r) of gradients g by that of ``g @ right``, in place.

    ``right`` is as for :func:`carry_moments`.
    """
    for rows in momentum.split(max(1, PIECE // right.shape[0])):
        rows.copy_(rows.double() @ right)


class MomentTransport:
    """The moments of a model's factor pairs, fetched, carried and stored round by round.

    Collective: all ranks create it after the same update.

    Args:
        work: the rounds, in which the moments travel like the factors.

    Attributes:
        updates: of the factor that had most; 0: there are no moments yet.
    """

    def __init__(self, work: FactorRounds) -> None:
        self._work = work
        self._mine: list[int] = []
        self._moments: list[Matrices] = []
        parameters = list({id(p): p for pair in work.pairs for p in (pair.b, pair.a)}.values())
        state = work.state
        done = _updates(state, [state.entries([p]) for p in parameters])
        self.updates = max(done, default=0)
        self._names = MOMENTUM if isinstance(state.base, Muon | Spectron) else MOMENTS
        self._bias: dict[int, AdamBias] = {}
        if self._names is MOMENTS:
            of_group = zip(state.base.param_groups, state.groups(), strict=True)
            betas = {id(p): group["betas"] for group, inside in of_group for p in inside}
            self._bias = {
                id(p): AdamBias.after(betas[id(p)], max(1, count))
                for p, count in zip(parameters, done, strict=True)
            }

    def fetch(self, round_index: int) -> None:
        """Bring the moments of a round to the owners of the factors. Collective."""
        self._mine = self._work.rounds[round_index][self._work.ranks.rank]
        self._moments = [self._work.to_owners(round_index, name) for name in self._names]

    def carry(self, index: int, t_b: Tensor, t_a: Tensor) -> None:
        """Carry the moments of this rank's pair ``index`` of the round, B' = B t_b, A' = t_a A."""
        pair = self._work.pairs[self._mine[index]]
        first_b, first_a = self._moments[0][index]
        if self._names is MOMENTUM:
            carry_momentum(first_b, t_a.mT)
            carry_momentum(first_a.mT, t_b)
            return
        second_b, second_a = self._moments[1][index]
        carry_moments(first_b, second_b, t_a.mT, self._bias[id(pair.b)])
        carry_moments(first_a.mT, second_a.mT, t_b, self._bias[id(pair.a)])

    def store(self, round_index: int) -> None:
        """Write the carried moments into the optimizer's states of all ranks. Collective."""
        for name, moment in zip(self._names, self._moments, strict=True):
            self._work.from_owners(round_index, moment, name)
        self._moments = []


def _updates(state: Masters, keys: Sequence[Sequence[Tensor]]) -> list[int]:
    """Step counters of parameters with these keys of the optimizer's state, the same on all ranks;
    0 before the first update."""
    here = [[state.base.state.get(key, {}).get("step", 0) for key in found] for found in keys]
    counts = [int(max(found, default=0)) for found in here]
    counters = torch.tensor(counts, dtype=torch.int64, device=state.device)
    for group in state.all_groups():
        dist.all_reduce(counters, op=dist.ReduceOp.MAX, group=group)
    return [int(count) for count in counters.tolist()]


def check_transport(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[Tensor]],
    pairs: Sequence[FactorPair],
) -> None:
    """Raise UserError for an optimizer whose moments of the factors cannot be carried.

    ``groups``: the parameters of each of its param groups.
    """
    factors = {id(p) for pair in pairs for p in (pair.b, pair.a)}
    options = [
        group
        for group, inside in zip(optimizer.param_groups, groups, strict=True)
        if any(id(p) in factors for p in inside)
    ]
    plain, name = isinstance(optimizer, torch.optim.AdamW), type(optimizer).__name__
    if isinstance(optimizer, Muon | Spectron):
        _check_momentum(optimizer, options, pairs)
    elif not plain or any(group["amsgrad"] for group in optimizer.param_groups):
        raise UserError(
            "restarts.reset = transport carries the moments of AdamW and the momentum of Muon, "
            f"NorMuon and Spectron, and {name}{' with amsgrad' if plain else ''} keeps other "
            "states: use reset zero, or optimizer.name adamw"
        )


def _check_momentum(
    optimizer: Muon | Spectron, options: Sequence[dict[str, Any]], pairs: Sequence[FactorPair]
) -> None:
    """Raise UserError unless all factors have a momentum that is linear in the gradients."""
    name, (mark,) = type(optimizer).__name__, optimizer.marks
    known = optimizer.logical_tensors()
    lost = [pair.name for pair in pairs if not {f"{pair.name}.B", f"{pair.name}.A"} <= known.keys()]
    if lost or not all(group[mark] for group in options):
        raise UserError(
            f"restarts.reset = transport carries {name}'s momentum, and not all factors have one "
            f"of their own: put them into groups with {mark}, or use reset zero"
        )
    if any(group.get("fraction", 1) < 1 for group in options):
        raise UserError(
            f"restarts.reset = transport carries a momentum that is an average of gradients, and "
            f"with optimizer.fraction below 1 that of {name} decays by rows that depend on the "
            "factors: use reset zero, or fraction 1"
        )
