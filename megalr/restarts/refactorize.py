"""Weight refactorization of a model inside an engine: B, A <- balanced factors of the same BA.

The fp32 masters are read and written (bf16 masters with ``paper_bf16``), then the weights that the
model computes with are refreshed from them. BA is taken unscaled: W = (alpha / r) BA keeps its
scale. With DLR's fixed offset E (layers.latent_residual) all of this holds for B + E. The function
of the network changes by no more than rounding of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megalr.layers.factors import FactorPair
from megalr.restarts.balance import PairOutcome, balance_in_place, gram, imbalance, with_residual
from megalr.restarts.masters import Masters
from megalr.restarts.rounds import FactorRounds, workspace_of
from megalr.restarts.spectra import SpectrumSummary, summarize_spectra
from megalr.restarts.transport import MomentTransport


@dataclass(frozen=True)
class Refactorized:
    """Counts of a refactorization, summed over ranks."""

    matrices: int
    by_qr: int  # matrices too ill-conditioned for the Gram path
    dead: int  # directions with singular value zero
    reseeded: int  # of these, given a new non-zero factor row or column
    spectra: dict[str, SpectrumSummary]  # by kind of projection; rank 0 logs them


@torch.no_grad()
def refactorize(work: FactorRounds, moments: MomentTransport | None = None) -> Refactorized:
    """Replace the factors of all pairs by balanced ones; collective over all data-parallel ranks.

    ``moments`` carries the optimizer's moments of the factors along; None: they stay. The caller
    has made sure that the factors are finite (:func:`nonfinite_parameters`).
    """
    workspace = workspace_of(work.factor_bytes)
    mine: dict[int, PairOutcome] = {}
    for index in range(len(work.rounds)):
        matrices = work.to_owners(index)
        if moments is not None:
            moments.fetch(index)
        found = balance_in_place(
            matrices,
            workspace_bytes=workspace,
            shards=work.shards(index),
            group=work.state.tensor_group,
            carry=None if moments is None else moments.carry,
            residuals=work.residuals(index),
        )
        mine |= zip(work.rounds[index][work.ranks.rank], found, strict=True)
        work.from_owners(index, matrices)
        if moments is not None:
            moments.store(index)
    work.state.refresh_weights()
    counts = [(one.by_qr, one.dead, one.reseeded) for one in mine.values()]
    sums = [sum(column) for column in zip(*counts, strict=True)] or [0, 0, 0]
    by_qr, dead, reseeded = sum_over(sums, work.state)
    spectra = summarize_spectra(work.pairs, mine, work.state)
    return Refactorized(len(work.pairs), by_qr, dead, reseeded, spectra)


@torch.no_grad()
def largest_imbalance(work: FactorRounds) -> float:
    """The largest ``||B'B - AA'|| / (||B'B|| + ||AA'||)`` of all pairs; equal on all ranks."""
    worst = torch.zeros((), dtype=torch.float64, device=work.state.device)
    for index in range(len(work.rounds)):
        group = work.state.tensor_group
        pairs = zip(work.to_owners(index), work.residuals(index), work.shards(index), strict=True)
        for (b, a), residual, (b_split, a_split) in pairs:
            b = with_residual(b, residual)
            grams = gram(b, group if b_split else None), gram(a.mT, group if a_split else None)
            worst = torch.maximum(worst, imbalance(*grams))
    # Tensor-parallel ranks too: factors that all hold need not round equally on each of them.
    for ranks in work.state.all_groups():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=ranks)
    return float(worst)


@torch.no_grad()
def nonfinite_parameters(state: Masters, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Names of the parameters whose master holds inf or nan on some rank; equal on all ranks."""
    if not parameters:
        return []
    flags = []
    for parameter in parameters:
        master = state.master(parameter)
        finite = torch.ones((), dtype=torch.bool) if master is None else master.isfinite().all()
        flags.append(finite.to(state.device, non_blocking=True))
    bad = (~torch.stack(flags)).to(torch.int32)
    for group in state.all_groups():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    return [state.name(p) for p, flag in zip(parameters, bad.tolist(), strict=True) if flag]


def factor_parameters(pairs: Sequence[FactorPair]) -> list[nn.Parameter]:
    """The parameters that hold the factors, each once."""
    return list({id(p): p for pair in pairs for p in (pair.b, pair.a)}.values())


def sum_over(values: Sequence[int], state: Masters, over_tensor_ranks: bool = False) -> list[int]:
    """Sums over the ranks that share the masters; also over those that hold other parts of them."""
    total = torch.tensor(list(values), dtype=torch.int64, device=state.device)
    for group in state.all_groups() if over_tensor_ranks else [state.process_group]:
        if group is not None:
            dist.all_reduce(total, group=group)
    return [int(value) for value in total.tolist()]
