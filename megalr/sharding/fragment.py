"""Where the logical tensors of a parameter lie in flat storage, and on which rank.

The optimizers of this package do not see parameters but *logical tensors*: a matrix as the paper
means it (``layers.3.attention.q``), a norm's weight, an embedding. A logical tensor is a contiguous
row-major range of some flat storage, which may be

* a parameter of its own (plain PyTorch),
* a row block of a parameter that stores several matrices stacked by rows (``p.row_blocks``),
* a range of the flat fp32 slices that ZeRO hands to its optimizer, possibly cut over ranks.

:class:`FlatLayout` describes one flat storage for all three cases with the same words, so that one
implementation of an update rule serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Piece:
    """``length`` elements of a tensor from element ``start`` on, at ``offset`` of a slice."""

    rank: int
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the model, and where its elements lie.

    ``pieces`` lists every rank's share in the order of ranks. ``owner`` is the rank that updates
    the tensor when the whole of it is needed. ``number`` counts the tensors of an optimizer from 1
    in the order of its parameter groups: it seeds random projections and staggers refreshes, and
    does not depend on how the tensors are spread over ranks.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    owner: int = 0
    number: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def piece_of(self, rank: int) -> Piece | None:
        """The share of ``rank``, or None when that rank holds nothing of the tensor."""
        return next((piece for piece in self.pieces if piece.rank == rank), None)


@dataclass(frozen=True)
class FlatLayout:
    """The logical tensors of one flat storage, as every rank of ``group`` knows them.

    ``group`` is the process group of the ranks that share the storage; with ``world_size`` 1 it
    is not used.
    """

    tensors: tuple[LogicalTensor, ...]
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    local: tuple[tuple[LogicalTensor, Piece], ...] = field(init=False)

    def __post_init__(self) -> None:
        pairs = ((tensor, tensor.piece_of(self.rank)) for tensor in self.tensors)
        object.__setattr__(self, "local", tuple((t, p) for t, p in pairs if p is not None))

    def is_whole(self, tensor: LogicalTensor) -> bool:
        """Whether one rank holds the tensor alone, so that nothing has to be exchanged."""
        return len(tensor.pieces) == 1


def piece_view(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of ``piece`` as a 1-D view of the slice ``flat``."""
    return flat.narrow(0, piece.offset, piece.length)


def split_rows(
    name: str, shape: Sequence[int], row_blocks: Sequence[tuple[str, int, int]] | None
) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, first element) of each logical tensor of one parameter.

    ``row_blocks`` holds (name, first row, end row) of matrices stacked in a 2-D parameter; None
    means that the parameter is one tensor.
    """
    if not row_blocks:
        return [(name, tuple(shape), 0)]
    columns = math.prod(shape[1:])
    return [
        (block, (stop - start, *shape[1:]), start * columns) for block, start, stop in row_blocks
    ]


def trivial_layout(parameter: torch.Tensor, name: str, first_number: int) -> FlatLayout:
    """The layout of a parameter that one process holds alone, in its own storage."""
    blocks = split_rows(name, parameter.shape, getattr(parameter, "row_blocks", None))
    tensors = tuple(
        LogicalTensor(block, shape, (Piece(0, 0, start, math.prod(shape)),), 0, first_number + i)
        for i, (block, shape, start) in enumerate(blocks)
    )
    return FlatLayout(tensors)


def cut_over_slices(numel: int, first: int, slice_size: int, world_size: int) -> tuple[Piece, ...]:
    """Pieces of a tensor at ``first`` of a flat buffer that is cut into equal slices.

    Rank k holds elements [k * slice_size, (k + 1) * slice_size) of the buffer (ZeRO 1 and 2).
    """
    pieces = []
    for rank in range(first // slice_size, world_size):
        left = max(first, rank * slice_size)
        right = min(first + numel, (rank + 1) * slice_size)
        if left >= right:
            break
        pieces.append(Piece(rank, left - first, left - rank * slice_size, right - left))
    return tuple(pieces)


def cut_each(first: int, numel: int, share: int, offset: int, world_size: int) -> tuple[Piece, ...]:
    """Pieces of a row block of a parameter that is itself cut into equal shares (ZeRO 3).

    The parameter's elements [k * share, (k + 1) * share) lie on rank k at ``offset`` of its slice;
    the block is the parameter's elements [first, first + numel).
    """
    pieces = []
    for rank in range(first // share, world_size):
        left = max(first, rank * share)
        right = min(first + numel, (rank + 1) * share)
        if left >= right:
            break
        pieces.append(Piece(rank, left - first, offset + left - rank * share, right - left))
    return tuple(pieces)


def assign_owners(tensors: Iterable[LogicalTensor], world_size: int) -> list[LogicalTensor]:
    """Give every tensor an owner: its only holder, or the least loaded rank among its holders.

    Of the ranks that hold a cut tensor, those with at least half of the largest share are
    candidates (the exchange stays small); among them the rank that owns the fewest elements so far
    is taken, lowest rank first. Larger tensors choose first. Deterministic on all ranks.
    """
    ordered = list(tensors)
    load = [0] * world_size
    owners: dict[int, int] = {}

    def size(index: int) -> int:
        return ordered[index].numel

    for index in sorted(range(len(ordered)), key=lambda i: (len(ordered[i].pieces) > 1, -size(i))):
        pieces = ordered[index].pieces
        largest = max(piece.length for piece in pieces)
        candidates = [piece.rank for piece in pieces if 2 * piece.length >= largest]
        owners[index] = min(candidates, key=lambda rank: (load[rank], rank))
        load[owners[index]] += size(index)
    return [replace(tensor, owner=owners[i]) for i, tensor in enumerate(ordered)]
