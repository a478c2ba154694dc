"""Summary of the singular values that a refactorization has found, by kind of projection.

The r x r eigenproblems of a refactorization give the singular values of every W = (alpha/r) B A
anyway. What is kept of them is small enough for one line of metrics: quantiles, the effective rank
and the imbalance of the factors before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.layers.factors import FactorPair
from megalr.restarts.balance import PairOutcome
from megalr.restarts.masters import Masters

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class SpectrumSummary:
    """The matrices of one kind, q in all layers for example.

    Attributes:
        rank: largest r of these matrices.
        effective_rank: mean over the matrices, see :func:`effective_rank`.
        imbalance: largest ``||B'B - AA'|| / (||B'B|| + ||AA'||)`` before the refactorization.
        singular_values: their :data:`QUANTILES` over all singular values of these W, ascending.
    """

    rank: int
    effective_rank: float
    imbalance: float
    singular_values: tuple[float, ...]


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of s / sum(s), for s (..., r) to (...); 0 where all are zero.

    Between 1 (one direction) and r (all equal). O. Roy, M. Vetterli: The effective rank, EUSIPCO
    2007.
    """
    total = singular_values.sum(dim=-1, keepdim=True)
    share = singular_values / torch.where(total > 0, total, 1.0)
    entropy = -torch.xlogy(share, share).sum(dim=-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


def summarize_spectra(
    pairs: Sequence[FactorPair], mine: Mapping[int, PairOutcome], state: Masters
) -> dict[str, SpectrumSummary]:
    """Summaries by kind, the last part of a matrix's name; collective over data-parallel ranks.

    Args:
        pairs: all factor pairs of the model.
        mine: outcomes of the pairs that this rank owns, by their index.
        state: masters of the factors.
    """
    width = max((pair.rank for pair in pairs), default=0)
    table = torch.zeros(len(pairs), width + 1, dtype=torch.float64, device=state.device)
    for index, one in mine.items():
        table[index, 0] = one.imbalance
        table[index, 1 : 1 + pairs[index].rank] = one.singular_values * abs(pairs[index].scale)
    if state.process_group is not None:
        dist.all_reduce(table, group=state.process_group)  # a gather: others' rows are zero
    table = table.cpu()
    kinds: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        kinds.setdefault(pair.name.rsplit(".", 1)[-1], []).append(index)
    return {kind: _summary(table[rows], pairs, rows) for kind, rows in kinds.items()}


def _summary(table: Tensor, pairs: Sequence[FactorPair], rows: Sequence[int]) -> SpectrumSummary:
    ranks = [pairs[row].rank for row in rows]
    values = torch.cat([line[1 : 1 + r] for line, r in zip(table, ranks, strict=True)])
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return SpectrumSummary(
        rank=max(ranks),
        effective_rank=float(effective_rank(table[:, 1:]).mean()),
        imbalance=float(table[:, 0].max()),
        singular_values=tuple(torch.quantile(values, levels).tolist()),
    )
