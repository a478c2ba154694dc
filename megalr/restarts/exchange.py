"""Bringing factors to the rank that works on them, and the results to the ranks that keep them.

ZeRO cuts flat slices wherever it happens to, in the middle of rows and of matrices. Each matrix has
one owner among the data-parallel ranks, chosen so that all have about the same work. Owners proceed
in rounds of a bounded number of bytes; a round costs two all-to-alls (ZeRO), one broadcast a rank
(stage 0, where all hold everything) or nothing (one rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.layers.factors import FactorPair
from megalr.restarts.state import ShardedState

Matrices = list[tuple[Tensor, Tensor]]  # (B (m, r), A (r, n)) of each pair

# fp32 bytes of factors that a rank works on in one round; buffers for the exchange are about
# twice as much. At least one matrix, whatever its size.
BUCKET_BYTES = 64 << 20


class FactorExchange:
    """The plan of rounds for a model's factor pairs; the same on all ranks.

    Attributes:
        pairs: the factorized matrices.
        owners: rank of the process group that works on each pair.
        rounds: for each round, for each rank, the indices of the pairs it works on.
    """

    def __init__(
        self, state: ShardedState, pairs: Sequence[FactorPair], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.state = state
        self.pairs = list(pairs)
        self.group = state.process_group
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        parameters = [parameter for pair in self.pairs for parameter in (pair.b, pair.a)]
        held = {name: state.held(p) for name, p in ((state.name(p), p) for p in parameters)}
        self._held: list[dict[str, tuple[int, int]]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(self._held, held, group=self.group)
        self.owners = share_out([_cost(pair) for pair in self.pairs], self.world_size)
        if self.world_size == 1 and self._masters_on_device():
            self.rounds = [[list(range(len(self.pairs)))]]  # in place: nothing to buffer
        else:
            self.rounds = self._make_rounds(bucket_bytes)

    def gather(self, round_index: int) -> Matrices:
        """The factors of this rank's pairs of a round: views of the masters where it holds them
        whole on its device, float32 copies otherwise. Collective."""
        mine = self.rounds[round_index][self.rank]
        if self._in_place():
            return [self._views(self.pairs[index]) for index in mine]
        sources = self.rounds[round_index]
        send = [self._pieces_held(self.rank, owner_pairs) for owner_pairs in sources]
        received = self._exchange(
            [_join([view for _, _, view in self._masters_of(p)], self.state.device) for p in send],
            [sum(stop - start for _, start, stop in self._pieces_held(r, mine)) for r in self._ranks()],
        )
        matrices = [self._empty(self.pairs[index]) for index in mine]
        flats = {
            key: matrix.view(-1)
            for index, (b, a) in zip(mine, matrices, strict=True)
            for key, matrix in (((index, 0), b), ((index, 1), a))
        }
        for source in self._ranks():
            offset = 0
            for key, start, stop in self._pieces_held(source, mine):
                flats[key][start:stop] = received[source][offset : offset + stop - start]
                offset += stop - start
        return matrices

    def publish(self, round_index: int, matrices: Matrices) -> None:
        """Write the results of all owners of a round into the masters of all ranks. Collective."""
        if self.world_size == 1 and self._in_place():
            return
        if self._in_place():
            self._broadcast(round_index, matrices)
            return
        mine = self.rounds[round_index][self.rank]
        flats = {
            key: matrix.view(-1)
            for index, (b, a) in zip(mine, matrices, strict=True)
            for key, matrix in (((index, 0), b), ((index, 1), a))
        }
        returned = [self._pieces_held(self.rank, owner_pairs) for owner_pairs in self.rounds[round_index]]
        received = self._exchange(
            [
                _join([flats[k][i:j] for k, i, j in self._pieces_held(r, mine)], self.state.device)
                for r in self._ranks()
            ],
            [sum(stop - start for _, start, stop in pieces) for pieces in returned],
        )
        for values, pieces in zip(received, returned, strict=True):
            offset = 0
            for _, _, view in self._masters_of(pieces):
                view.copy_(values[offset : offset + view.numel()])
                offset += view.numel()

    # A piece is (key, start, stop): elements of the flattened B (key (pair, 0)) or A (key (pair, 1)).

    def _pieces_held(
        self, rank: int, indices: Sequence[int]
    ) -> list[tuple[tuple[int, int], int, int]]:
        """What ``rank`` holds of the given pairs, in an order that all ranks agree on."""
        pieces = []
        for index in indices:
            for side, (parameter, low, high) in enumerate(self._ranges(self.pairs[index])):
                held_low, held_high = self._held[rank][self.state.name(parameter)]
                start, stop = max(low, held_low), min(high, held_high)
                if start < stop:
                    pieces.append(((index, side), start - low, stop - low))
        return pieces

    def _masters_of(
        self, pieces: Sequence[tuple[tuple[int, int], int, int]]
    ) -> Iterator[tuple[tuple[int, int], int, Tensor]]:
        """This rank's master of each of its pieces, as a 1-D view."""
        for (index, side), start, stop in pieces:
            parameter, low, _ = self._ranges(self.pairs[index])[side]
            master = self.state.master(parameter)
            assert master is not None  # _pieces_held says that this rank holds it
            first = low + start - self._held[self.rank][self.state.name(parameter)][0]
            yield (index, side), start, master[first : first + stop - start]

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

    def _exchange(self, send: list[Tensor], receive_sizes: list[int]) -> tuple[Tensor, ...]:
        """All-to-all: ``send[k]`` to rank k; what rank k sent, for every k."""
        sizes = [chunk.numel() for chunk in send]
        joined = torch.cat(send)
        send.clear()  # the pieces are not needed twice
        received = torch.empty(sum(receive_sizes), device=joined.device)
        dist.all_to_all_single(received, joined, receive_sizes, sizes, group=self.group)
        return received.split(receive_sizes)

    def _broadcast(self, round_index: int, matrices: Matrices) -> None:
        """Stage 0: every owner sends its results to all."""
        for owner, indices in enumerate(self.rounds[round_index]):
            if not indices:
                continue
            views = [t.reshape(-1) for i in indices for t in self._views(self.pairs[i])]
            joined = torch.cat(views)
            dist.broadcast(joined, dist.get_global_rank(self.group, owner), group=self.group)
            if owner != self.rank:
                for view, values in zip(
                    views, joined.split([v.numel() for v in views]), strict=True
                ):
                    view.copy_(values)

    def _make_rounds(self, bucket_bytes: int) -> list[list[list[int]]]:
        """Cut each rank's pairs into buckets; shapes that are equal follow one another."""
        buckets: list[list[list[int]]] = [[] for _ in self._ranks()]
        order = sorted(range(len(self.pairs)), key=lambda i: (self.pairs[i].rank, i))
        for rank in self._ranks():
            size = bucket_bytes
            for index in (i for i in order if self.owners[i] == rank):
                pair = self.pairs[index]
                needed = 4 * pair.rank * sum(pair.shape)
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


def share_out(costs: Sequence[float], workers: int) -> list[int]:
    """A worker for every cost: the dearest first, each to the worker with least work so far."""
    load = [0.0] * workers
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(workers), key=lambda w: (load[w], w))
        owners[index] = owner
        load[owner] += costs[index]
    return owners


def _cost(pair: FactorPair) -> float:
    """Relative time: the r x r eigenproblem (some 20 r^3) outweighs the products (4 (m + n) r^2)."""
    return 20.0 * pair.rank**3 + 4.0 * sum(pair.shape) * pair.rank**2


def _join(views: Sequence[Tensor], device: torch.device) -> Tensor:
    """The views end to end, float32 on ``device``."""
    if not views:
        return torch.empty(0, device=device)
    return torch.cat([view.reshape(-1) for view in views]).to(device, torch.float32)
