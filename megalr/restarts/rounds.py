"""Rounds in which the data-parallel ranks share the work on factor pairs.

Each pair has one owner, chosen so that all ranks have about the same work. Owners proceed in rounds
of a bounded number of bytes. A round costs two all-to-alls under ZeRO, one broadcast per rank at
stage 0, where every rank holds all masters, and nothing on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megalr.layers.factors import FactorPair
from megalr.layers.latent_residual import LatentResidual
from megalr.restarts.masters import Masters
from megalr.sharding.dtensor import local_part
from megalr.sharding.exchange import (
    Located,
    broadcast_from_owners,
    buckets,
    from_owner,
    least_loaded,
    to_owner,
)
from megalr.sharding.fragment import Fragment, LogicalTensor, Ranks, within

Matrices = list[tuple[Tensor, Tensor]]
"""B (m, r) and A (r, n) of each pair."""

MIB = 1 << 20


@dataclass(frozen=True, eq=False)
class _Factor:
    """B or A of a pair, its parameter, and the flat tensor of masters it lies in on this rank."""

    tensor: LogicalTensor
    parameter: nn.Parameter
    flat: Tensor


class FactorRounds:
    """The rounds for a model's factor pairs; the same on all ranks.

    Args:
        state: where the masters lie.
        pairs: the factorized matrices.
        bucket_bytes: fp32 bytes of factors that a rank works on in one round (at least one pair);
            the buffers of the exchange take twice as much. None: :func:`bucket_of` all factors.
        with_moments: both moments travel with the factors, of which a third is then sent at a time.

    Attributes:
        ranks: the data-parallel ranks.
        owners: the rank that works on each pair.
        rounds: for each round, for each rank, the indices of the pairs that it works on.
    """

    def __init__(
        self,
        state: Masters,
        pairs: Sequence[FactorPair],
        bucket_bytes: int | None = None,
        with_moments: bool = False,
    ) -> None:
        self.state = state
        self.pairs = list(pairs)
        self.ranks = Ranks.of(state.process_group)
        size = self.ranks.size
        costs = [_cost(pair) for pair in self.pairs]
        self.owners = least_loaded(costs, [range(size)] * len(costs), [0.0] * size)
        self._factors = [
            _located(state, pair, owner)
            for pair, owner in zip(self.pairs, self.owners, strict=True)
        ]
        on_device = all(
            factor.flat.device.type == state.device.type
            for pair in self._factors
            for factor in pair
        )
        self._in_place = on_device and (state.replicated or size == 1)
        self.rounds = [[list(range(len(self.pairs)))]]  # in place on one rank: nothing to buffer
        if size > 1 or not on_device:
            bucket_bytes = bucket_bytes or bucket_of(self.factor_bytes)
            self.rounds = self._make_rounds(bucket_bytes // (3 if with_moments else 1))

    @property
    def factor_bytes(self) -> int:
        """fp32 bytes of all factors."""
        return sum(self._bytes(index) for index in range(len(self.pairs)))

    def to_owners(self, round_index: int, moment: str | None = None) -> Matrices:
        """The factors of this rank's pairs of a round: views of the masters where it holds them
        whole on its device, float32 copies otherwise. Collective.

        ``moment``: instead of the factors, the optimizer's state of that name, zero where there is
        none. States of whole matrices come from the ranks that keep them.
        """
        tensors = self._tensors(round_index, moment)
        if self._in_place:
            whole = {t.name: t.fragments[0].of(flat).view(t.shape) for t, flat in tensors}
        else:
            whole = to_owner(self.ranks, tensors, self._like())
        mine = (self._factors[index] for index in self.rounds[round_index][self.ranks.rank])
        return [(whole[b.tensor.name], whole[a.tensor.name]) for b, a in mine]

    def from_owners(self, round_index: int, matrices: Matrices, moment: str | None = None) -> None:
        """Write the results of all owners of a round into the masters of all ranks, or into the
        optimizer's state named ``moment``. Collective."""
        tensors = self._tensors(round_index, moment)
        if self._in_place:
            broadcast_from_owners(self.ranks, tensors)
            return
        whole: dict[str, Tensor] = {}
        mine = self.rounds[round_index][self.ranks.rank]
        for index, (new_b, new_a) in zip(mine, matrices, strict=True):
            b, a = self._factors[index]
            whole |= {b.tensor.name: new_b, a.tensor.name: new_a}
        parts = from_owner(self.ranks, [tensor for tensor, _ in tensors], whole, self._like())
        for tensor, flat in tensors:
            if (fragment := tensor.on(self.ranks.rank)) is not None:
                fragment.of(flat).copy_(parts[tensor.name])

    def shards(self, round_index: int) -> list[tuple[bool, bool]]:
        """For this rank's pairs of a round: whether tensor parallelism splits B by rows, and A by
        columns."""
        mine = self.rounds[round_index][self.ranks.rank]
        specs = (self.pairs[index].spec for index in mine)
        return [(spec.outputs, spec.inputs) for spec in specs]

    def residuals(self, round_index: int) -> list[LatentResidual | None]:
        """The fixed offset of B of this rank's pairs of a round."""
        return [self.pairs[i].residual for i in self.rounds[round_index][self.ranks.rank]]

    def _tensors(self, round_index: int, moment: str | None) -> list[Located]:
        indices = (index for mine in self.rounds[round_index] for index in mine)
        factors = [factor for index in indices for factor in self._factors[index]]
        if moment is None:
            return [(factor.tensor, factor.flat) for factor in factors]
        if moment in getattr(self.state.base, "matrix_elements", ()):
            return self._kept(factors, moment)
        return [(factor.tensor, self._values(factor, moment)) for factor in factors]

    def _values(self, factor: _Factor, moment: str) -> Tensor:
        """The state that lies on this rank as the factor's masters do."""
        for key in self.state.entries([factor.parameter]):
            if moment in self.state.base.state.get(key, {}):
                return local_part(self.state.base.state[key][moment]).view(-1)
        return torch.zeros_like(factor.flat)  # no update yet, or nothing of it on this rank

    def _kept(self, factors: Sequence[_Factor], moment: str) -> list[Located]:
        """States that lie whole on the rank that makes the update of a factor."""
        base = self.state.base
        places = base.logical_tensors()  # type: ignore[attr-defined]
        found = []
        for factor in factors:
            entry, tensor = places[factor.tensor.name]
            whole = (Fragment(tensor.owner, 0, 0, tensor.numel),)
            own = base.state.get(entry, {}).get("matrices", {}).get(tensor.name, {})
            if moment not in own:  # no update yet, or another rank keeps it
                here = self._in_place or tensor.owner == self.ranks.rank
                own = {moment: factor.flat.new_zeros(tensor.numel if here else 0)}
            found.append((replace(factor.tensor, fragments=whole), own[moment].view(-1)))
        return found

    def _like(self) -> Tensor:
        """Factors travel and are worked on as these elements: float32, or float64 as they are."""
        double = any(x.flat.dtype == torch.float64 for pair in self._factors for x in pair)
        dtype = torch.float64 if double else torch.float32
        return torch.empty(0, dtype=dtype, device=self.state.device)

    def _bytes(self, index: int) -> int:
        return 4 * sum(factor.tensor.numel for factor in self._factors[index])

    def _make_rounds(self, bucket_bytes: int) -> list[list[list[int]]]:
        """Put each rank's pairs into buckets; pairs of equal rank r follow one another."""
        order = sorted(range(len(self.pairs)), key=lambda index: (self.pairs[index].rank, index))
        of_ranks = [
            list(buckets([i for i in order if self.owners[i] == rank], self._bytes, bucket_bytes))
            for rank in range(self.ranks.size)
        ]
        count = max(len(mine) for mine in of_ranks)
        return [[mine[i] if i < len(mine) else [] for mine in of_ranks] for i in range(count)]


def bucket_of(factor_bytes: int) -> int:
    """Bytes of factors in one round: a 16th of all, 8 to 48 MiB.

    Together with :func:`workspace_of` chosen to take less than 1 % of the peak memory of training
    runs of 60M to 7B parameters.
    """
    return min(48 * MIB, max(8 * MIB, factor_bytes // 16))


def workspace_of(factor_bytes: int) -> int:
    """Bytes for one batch of r x r matrices: a sixth of all factors, 32 to 126 MiB.

    That is 30 matrices of r = 128, 6 of r = 512. A function of the model alone, because the size of
    a batch may change the last bits of its results.
    """
    return min(126 * MIB, max(32 * MIB, factor_bytes // 6))


def _cost(pair: FactorPair) -> float:
    """Relative time: the r x r eigenproblem, some 20 r^3, and the products, 4 (m + n) r^2."""
    return 20.0 * pair.rank**3 + 4.0 * sum(pair.shape) * pair.rank**2


def _located(state: Masters, pair: FactorPair, owner: int) -> tuple[_Factor, _Factor]:
    """B and A of a pair."""
    (m, n), r = pair.shape, pair.rank
    found = []
    for name, parameter, first, shape in (
        ("B", pair.b, pair.b_rows[0] * r, (m, r)),
        ("A", pair.a, pair.a_rows[0] * n, (r, n)),
    ):
        flat, fragments = state.fragments(parameter)
        inside = within(fragments, first, shape[0] * shape[1])
        tensor = LogicalTensor(f"{pair.name}.{name}", shape, inside, owner)
        found.append(_Factor(tensor, parameter, flat.detach().view(-1)))
    return found[0], found[1]
