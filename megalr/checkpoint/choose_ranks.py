"""Ranks of many matrices under one budget, from their singular values.

The error of cutting a matrix W at rank r is the sum of its squared singular values beyond r
(Eckart and Young 1936), and one more rank costs m + n numbers. So a budget is best spent where
sigma^2 / (m + n) is largest, over all matrices: the rule that fills the largest first. It is exact
where all matrices cost the same, and else up to the last step that fits.

A factorized matrix shows no singular values beyond its rank r. They are estimated on the line
through log sigma^2 at r/2 and at r, so that matrices whose values fall off slowly gain rank
from those whose last directions are nearly zero.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalr.errors import UserError


@dataclass(frozen=True)
class Spectrum:
    """What is known of one matrix W (m, n).

    Attributes:
        name: logical name, ``layers.3.mlp.down``.
        size: ``(m, n)``.
        values: singular values of W, descending; as many as its present rank.
    """

    name: str
    size: tuple[int, int]
    values: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The present rank."""
        return len(self.values)

    def squares(self, count: int) -> list[float]:
        """The first ``count`` squared singular values; those beyond the rank are estimated."""
        known = [value * value for value in self.values]
        half, last = known[(self.rank - 1) // 2], known[-1]
        distance = self.rank - 1 - (self.rank - 1) // 2
        # With one value, or where the last is zero, nothing beyond it is expected.
        slope = math.log(last / half) / distance if last > 0 and distance else -math.inf
        beyond = count - self.rank
        return known[:count] + [last * math.exp(slope * step) for step in range(1, beyond + 1)]


def choose_ranks(
    spectra: Sequence[Spectrum], budget: int, multiple: int = 8, growth: float = 2.0
) -> dict[str, int]:
    """The rank of each matrix: steps of ``multiple`` with the largest squares per number first.

    Every matrix keeps one step. Of equal steps that of the earlier matrix comes first.

    Args:
        spectra: the matrices.
        budget: numbers in all factors together, sum r (m + n), at most.
        multiple: ranks are multiples of it; a matrix with a smaller side below it keeps that side.
        growth: no rank grows by more than this factor (rounded down to a step), nor beyond the
            smaller side.

    Raises:
        UserError: the budget does not allow one step each.
    """
    limits = [_limit(one, multiple, growth) for one in spectra]
    squares = [one.squares(limit) for one, limit in zip(spectra, limits, strict=True)]
    ranks = [min(multiple, limit) for limit in limits]
    left = budget - sum(rank * sum(one.size) for rank, one in zip(ranks, spectra, strict=True))
    if left < 0:
        raise UserError(
            f"a budget of {budget:,} numbers is {-left:,} too small for rank {multiple} in each of "
            f"{len(spectra)} matrices: give a larger share or a smaller multiple"
        )
    waiting: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        rank, one = ranks[index], spectra[index]
        if rank + multiple <= limits[index]:
            gain = sum(squares[index][rank : rank + multiple]) / sum(one.size)
            heapq.heappush(waiting, (-gain, index))

    for index in range(len(spectra)):
        offer(index)
    while waiting:
        _, index = heapq.heappop(waiting)
        cost = multiple * sum(spectra[index].size)
        if cost <= left:  # later steps of this matrix cost as much
            left -= cost
            ranks[index] += multiple
            offer(index)
    return {one.name: rank for one, rank in zip(spectra, ranks, strict=True)}


def _limit(one: Spectrum, multiple: int, growth: float) -> int:
    side = min(one.size)
    grown = max(multiple, int(growth * one.rank) // multiple * multiple)
    return min(side, grown) if side < multiple else min(side // multiple * multiple, grown)


def as_entries(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """``method.ranks`` that gives these ranks beside ``method.rank`` default, in few entries.

    The most frequent rank of a projection stands under its short name, others under full names
    behind that.
    """
    of_kind: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        of_kind.setdefault(name.rsplit(".", 1)[-1], []).append(rank)
    usual = {kind: max(dict.fromkeys(all_), key=all_.count) for kind, all_ in of_kind.items()}
    entries = {kind: rank for kind, rank in usual.items() if rank != default}
    entries |= {n: rank for n, rank in ranks.items() if rank != usual[n.rsplit(".", 1)[-1]]}
    return entries
