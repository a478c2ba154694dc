"""Whole matrices from the parts of tensor-parallel ranks, and parts from whole matrices.

The ranks share the work on a batch of b matrices of one shape: each is the worker of about b / p of
the p ranks' matrices, gets their parts from the others and gives the results back. Ranks of one
tensor-parallel group hold equal parts of the same matrices in the same order, so all of them call
these functions with batches of one shape, and nothing is negotiated. Matrices that are not cut stay
where they are: every rank works on its copy.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.sharding.exchange import collective_device, reduce_over_ranks
from megalr.sharding.fragment import Cut


def counts(cut: Cut, total: int) -> list[int]:
    """How many of ``total`` matrices each rank works on.

    Of what is left over the first ranks get one each where rows are cut, the last ones where
    columns are: batches of both kinds together burden all ranks alike.
    """
    size = cut.ranks.size
    more = [(rank if cut.dim == 0 else size - 1 - rank) < total % size for rank in range(size)]
    return [total // size + one for one in more]


def share(cut: Cut, total: int) -> slice:
    """The matrices of a batch of ``total`` that this rank works on."""
    ends = list(accumulate(counts(cut, total), initial=0))
    return slice(ends[cut.ranks.rank], ends[cut.ranks.rank + 1])


def to_workers(parts: Tensor, cut: Cut) -> Tensor:
    """This rank's parts (b, m, n) of b matrices to the whole ones that it works on, (c, M, N)."""
    if cut.ranks.size == 1:
        return parts
    number = counts(cut, len(parts))
    mine = number[cut.ranks.rank]
    received = _all_to_all(parts, number, [mine] * cut.ranks.size, cut)
    if not mine:
        return parts.new_empty(0, *cut.whole_shape(parts.shape[1:]))
    return torch.cat(received.split(mine), dim=cut.dim + 1)


def from_workers(whole: Tensor, cut: Cut, total: int) -> Tensor:
    """The inverse: results (c, M, N) of this rank to its parts (b, m, n) of all ``total``."""
    if cut.ranks.size == 1:
        return whole
    sent = torch.cat(whole.chunk(cut.ranks.size, dim=cut.dim + 1))
    return _all_to_all(sent, [len(whole)] * cut.ranks.size, counts(cut, total), cut)


def completed(values: Tensor, cut: Cut, dim: int, part: slice, size: int) -> Tensor:
    """Values that each rank has a range ``part`` of, whole on all ranks, ``size`` along ``dim``.

    Where ranges overlap the values are added.
    """
    if cut.ranks.size == 1:
        return values
    shape = list(values.shape)
    shape[dim] = size
    whole = values.new_zeros(shape)
    whole.narrow(dim, part.start, part.stop - part.start).copy_(values)
    return reduce_over_ranks(whole, cut.ranks, dist.ReduceOp.SUM)


def agreed(flags: Tensor, cut: Cut) -> Tensor:
    """Whether flags are true on all ranks that hold parts, the same on each of them."""
    if cut.ranks.size == 1:
        return flags
    return reduce_over_ranks(flags.int(), cut.ranks, dist.ReduceOp.MIN).bool()


def _all_to_all(sent: Tensor, out: list[int], into: list[int], cut: Cut) -> Tensor:
    """Send the next ``out[k]`` matrices to rank k; those that arrive, ``into[k]`` from rank k."""
    buffer = sent.contiguous().to(collective_device(cut.ranks, sent))
    received = buffer.new_empty(sum(into), *sent.shape[1:])
    dist.all_to_all_single(received, buffer, into, out, group=cut.ranks.group)
    return received.to(sent.device)
