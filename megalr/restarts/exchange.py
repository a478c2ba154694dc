"""Bringing factors to the rank that works on them, and the results to the ranks that keep them.

ZeRO cuts flat slices wherever it happens to, in the middle of rows and of matrices. Each matrix has
one owner among the data-parallel ranks, chosen so that all have about the same work. Owners proceed
in rounds of a bounded number of bytes; a round costs two all-to-alls (ZeRO), one broadcast a rank
(stage 0, where all hold everything) or nothing (one rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.engine.state import EngineState
from megalr.layers.factors import FactorPair

Matrices = list[tuple[Tensor, Tensor]]  # (B (m, r), A (r, n)) of each pair

MIB = 1 << 20


class _Piece(NamedTuple):
    """Elements [start, stop) of the flattened B (side 0) or A (side 1) of a pair."""

    pair: int
    side: int
    start: int
    stop: int


class FactorExchange:
    """The plan of rounds for a model's factor pairs; the same on all ranks.

    ``bucket_bytes``: fp32 bytes of factors that a rank works on in one round (at least one matrix);
    the buffers of the exchange take twice as much. None: :func:`bucket_of` all factors.

    Attributes:
        pairs: the factorized matrices.
        owners: rank of the process group that works on each pair.
        rounds: for each round, for each rank, the indices of the pairs it works on.
    """

    def __init__(
        self, state: EngineState, pairs: Sequence[FactorPair], bucket_bytes: int | None = None
    ) -> None:
        self.state = state
        self.pairs = list(pairs)
        self.group = state.process_group
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        parameters = [parameter for pair in self.pairs for parameter in (pair.b, pair.a)]
        held = {state.name(parameter): state.held(parameter) for parameter in parameters}
        self._held: list[dict[str, tuple[int, int]]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(self._held, held, group=self.group)
        self.owners = share_out([_cost(pair) for pair in self.pairs], self.world_size)
        if self.world_size == 1 and self._masters_on_device():
            self.rounds = [[list(range(len(self.pairs)))]]  # in place: nothing to buffer
        else:
            self.rounds = self._make_rounds(bucket_bytes or bucket_of(self.factor_bytes))

    @property
    def factor_bytes(self) -> int:
        """fp32 bytes of all factors."""
        return sum(_bytes(pair) for pair in self.pairs)

    def gather(self, round_index: int) -> Matrices:
        """The factors of this rank's pairs of a round: views of the masters where it holds them
        whole on its device, float32 copies otherwise. Collective."""
        work = self.rounds[round_index]
        mine = work[self.rank]
        if self._in_place():
            return [self._views(self.pairs[index]) for index in mine]
        matrices = [self._empty(self.pairs[index]) for index in mine]
        self._transfer(
            outgoing=[self._master_views(indices) for indices in work],
            incoming=[self._matrix_views(rank, mine, matrices) for rank in self._ranks()],
        )
        return matrices

    def cuts(self, round_index: int) -> list[tuple[bool, bool]]:
        """For this rank's pairs of a round: is B cut by rows, and A by columns, over ranks."""
        mine = (self.pairs[index].spec for index in self.rounds[round_index][self.rank])
        return [(cut.outputs, cut.inputs) for cut in mine]

    def publish(self, round_index: int, matrices: Matrices) -> None:
        """Write the results of all owners of a round into the masters of all ranks. Collective."""
        work = self.rounds[round_index]
        if not self._in_place():
            self._transfer(
                outgoing=[
                    self._matrix_views(rank, work[self.rank], matrices) for rank in self._ranks()
                ],
                incoming=[self._master_views(indices) for indices in work],
            )
        elif self.world_size > 1:
            self._broadcast(work)

    def _pieces(self, rank: int, indices: Sequence[int]) -> Iterator[_Piece]:
        """What ``rank`` holds of the given pairs, in an order that all ranks agree on."""
        for index in indices:
            for side, (parameter, low, high) in enumerate(self._ranges(self.pairs[index])):
                held_low, held_high = self._held[rank][self.state.name(parameter)]
                start, stop = max(low, held_low), min(high, held_high)
                if start < stop:
                    yield _Piece(index, side, start - low, stop - low)

    def _master_views(self, indices: Sequence[int]) -> list[Tensor]:
        """This rank's masters of what it holds of the given pairs, as 1-D views."""
        views = []
        for piece in self._pieces(self.rank, indices):
            parameter, low, _ = self._ranges(self.pairs[piece.pair])[piece.side]
            master = self.state.master(parameter)
            assert master is not None  # _pieces says that this rank holds some of it
            offset = low - self._held[self.rank][self.state.name(parameter)][0]
            views.append(master[offset + piece.start : offset + piece.stop])
        return views

    def _matrix_views(self, rank: int, indices: Sequence[int], matrices: Matrices) -> list[Tensor]:
        """The parts of whole matrices (of the given pairs) that ``rank`` holds, as 1-D views."""
        whole = dict(zip(indices, matrices, strict=True))
        return [
            whole[piece.pair][piece.side].view(-1)[piece.start : piece.stop]
            for piece in self._pieces(rank, indices)
        ]

    def _transfer(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]]) -> None:
        """All-to-all: ``outgoing[k]`` to rank k; what rank k sent into ``incoming[k]``."""
        send_sizes = [sum(view.numel() for view in views) for views in outgoing]
        receive_sizes = [sum(view.numel() for view in views) for views in incoming]
        sent = torch.cat([_join(views, self.state.device) for views in outgoing])
        received = torch.empty(sum(receive_sizes), device=self.state.device)
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.group)
        del sent
        _spread(received, [view for views in incoming for view in views])

    def _broadcast(self, work: list[list[int]]) -> None:
        """Stage 0: every owner sends its results to all."""
        for owner, indices in enumerate(work):
            if not indices:
                continue
            views = [t.reshape(-1) for index in indices for t in self._views(self.pairs[index])]
            joined = torch.cat(views)
            dist.broadcast(joined, dist.get_global_rank(self.group, owner), group=self.group)
            if owner != self.rank:
                _spread(joined, views)

    def _ranges(self, pair: FactorPair) -> tuple[tuple[nn.Parameter, int, int], ...]:
        """For B and A: the parameter and the range of its flattened elements that is the matrix."""
        _, columns = pair.shape
        rows_b, rows_a = pair.b_rows, pair.a_rows
        return (
            (pair.b, rows_b[0] * pair.rank, rows_b[1] * pair.rank),
            (pair.a, rows_a[0] * columns, rows_a[1] * columns),
        )

    def _views(self, pair: FactorPair) -> tuple[Tensor, Tensor]:
        rows, columns = pair.shape
        views = []
        for parameter, low, high in self._ranges(pair):
            master = self.state.master(parameter)
            assert master is not None  # held entirely by every rank
            views.append(master[low:high])
        return views[0].view(rows, pair.rank), views[1].view(pair.rank, columns)

    def _empty(self, pair: FactorPair) -> tuple[Tensor, Tensor]:
        rows, columns = pair.shape
        new = torch.empty((rows + columns) * pair.rank, device=self.state.device)
        return new[: rows * pair.rank].view(rows, -1), new[rows * pair.rank :].view(pair.rank, -1)

    def _make_rounds(self, bucket_bytes: int) -> list[list[list[int]]]:
        """Cut each rank's pairs into buckets; shapes that are equal follow one another."""
        buckets: list[list[list[int]]] = [[] for _ in self._ranks()]
        order = sorted(range(len(self.pairs)), key=lambda i: (self.pairs[i].rank, i))
        for rank in self._ranks():
            size = bucket_bytes
            for index in (i for i in order if self.owners[i] == rank):
                needed = _bytes(self.pairs[index])
                if size + needed > bucket_bytes:
                    buckets[rank].append([])
                    size = 0
                buckets[rank][-1].append(index)
                size += needed
        count = max(len(b) for b in buckets)
        return [[b[i] if i < len(b) else [] for b in buckets] for i in range(count)]

    def _in_place(self) -> bool:
        return (self.state.replicated or self.world_size == 1) and self._masters_on_device()

    def _masters_on_device(self) -> bool:
        masters = (self.state.master(pair.b) for pair in self.pairs)
        return all(m is not None and m.device.type == self.state.device.type for m in masters)

    def _ranks(self) -> range:
        return range(self.world_size)


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


def share_out(costs: Sequence[float], workers: int) -> list[int]:
    """A worker for every cost: the dearest first, each to the worker with least work so far."""
    load = [0.0] * workers
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(workers), key=lambda w: (load[w], w))
        owners[index] = owner
        load[owner] += costs[index]
    return owners


def _bytes(pair: FactorPair) -> int:
    """Bytes of both factors in fp32."""
    return 4 * pair.rank * sum(pair.shape)


def _cost(pair: FactorPair) -> float:
    """Relative time: the r x r eigenproblem, some 20 r^3, and the products, 4 (m + n) r^2."""
    return 20.0 * pair.rank**3 + 4.0 * sum(pair.shape) * pair.rank**2


def _join(views: Sequence[Tensor], device: torch.device) -> Tensor:
    """The views end to end, float32 on ``device``."""
    if not views:
        return torch.empty(0, device=device)
    return torch.cat(list(views)).to(device, torch.float32)


def _spread(values: Tensor, views: Sequence[Tensor]) -> None:
    """The inverse of :func:`_join`: write consecutive values into the views."""
    for view, part in zip(views, values.split([v.numel() for v in views]), strict=True):
        view.copy_(part)
