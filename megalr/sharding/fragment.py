"""Where the elements of a tensor lie: on which rank, and where in that rank's flat tensor.

Update rules, refactorization and checkpoints do not work on parameters but on *logical tensors*: a
matrix as the papers mean it (``layers.3.attention.q``), a norm's weight, an embedding. A logical
tensor is a contiguous row-major range of a parameter (all of it, or a row block of a parameter that
stacks several matrices: ``p.row_blocks``), and a parameter lies

* in a flat tensor of its own (plain PyTorch, ZeRO 0),
* or in flat tensors of which every rank holds one, split at arbitrary elements (ZeRO 1 to 3).

A :class:`Fragment` is one rank's share of a tensor. :class:`FlatLayout` lists the fragments of all
ranks for all logical tensors of one flat tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a tensor, at ``offset`` of the flat tensor of ``rank``."""

    rank: int
    start: int
    offset: int
    numel: int

    @property
    def stop(self) -> int:
        """End of the range of the tensor's elements."""
        return self.start + self.numel

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements as a view of the rank's flat tensor (1-D), or of one shaped like it."""
        return flat.narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Ranks:
    """The processes that share flat tensors. ``group`` is not used where ``size`` is 1."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The processes of a group, seen from this one; None: this process alone."""
        return (
            cls() if group is None else cls(dist.get_rank(group), dist.get_world_size(group), group)
        )


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cuts a matrix: into equal parts along ``dim``, in the order of ranks.

    ``ranks`` are those with the other parts. One rank: it holds the matrix whole, and so may others
    (a copy each).
    """

    ranks: Ranks = Ranks()
    dim: int = 0

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole matrix of which this rank's part has ``shape``."""
        return tuple(n * self.ranks.size if i == self.dim else n for i, n in enumerate(shape))

    def part(self, whole: torch.Tensor, dim: int | None = None) -> torch.Tensor:
        """This rank's part of a tensor cut along ``dim`` (None: like the matrix), a view."""
        return whole.chunk(self.ranks.size, self.dim if dim is None else dim)[self.ranks.rank]


UNCUT = Cut()


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the model, and where its elements lie.

    Under tensor parallelism it is this rank's part of the model's tensor, as ``cut`` says.
    ``fragments`` are in the order of ranks. ``owner`` is the rank that works on the whole tensor.
    ``number`` counts the tensors of an optimizer from 1 in the order of its parameter groups: it
    seeds random projections and staggers refreshes, and does not depend on the number of ranks.
    """

    name: str
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    owner: int = 0
    number: int = 1
    cut: Cut = UNCUT

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_split(self) -> bool:
        """Whether more than one rank holds some of it, so that elements have to be exchanged."""
        return len(self.fragments) > 1

    def on(self, rank: int) -> Fragment | None:
        """The fragment of a rank; None if the rank holds none of the tensor."""
        return next((fragment for fragment in self.fragments if fragment.rank == rank), None)


@dataclass(frozen=True)
class FlatLayout:
    """The logical tensors of one flat tensor, equal on all ``ranks`` but for their own rank."""

    tensors: tuple[LogicalTensor, ...]
    ranks: Ranks = Ranks()
    local: tuple[tuple[LogicalTensor, Fragment], ...] = field(init=False)
    """The tensors of which this rank holds elements, each with its fragment here."""

    def __post_init__(self) -> None:
        pairs = ((tensor, tensor.on(self.ranks.rank)) for tensor in self.tensors)
        object.__setattr__(self, "local", tuple((t, f) for t, f in pairs if f is not None))


def logical_tensors(
    name: str, parameter: torch.Tensor, shape: Sequence[int], fragments: Sequence[Fragment]
) -> list[LogicalTensor]:
    """The logical tensors of a parameter of the given full shape that lies in ``fragments``.

    ``parameter.row_blocks`` holds (name, first row, end row) of matrices stacked in a 2-D
    parameter; without it the parameter is one tensor.
    """
    blocks = getattr(parameter, "row_blocks", None) or ((name, 0, shape[0] if shape else 1),)
    columns = math.prod(shape[1:])
    return [
        LogicalTensor(
            block,
            (stop - start, *shape[1:]) if shape else (),
            within(fragments, start * columns, (stop - start) * columns),
        )
        for block, start, stop in blocks
    ]


def single_process_layout(parameter: torch.Tensor, name: str, first_number: int) -> FlatLayout:
    """The layout of a parameter that one process holds alone, in its own storage."""
    whole = (Fragment(0, 0, 0, parameter.numel()),)
    tensors = logical_tensors(name, parameter, parameter.shape, whole)
    return FlatLayout(tuple(replace(t, number=first_number + i) for i, t in enumerate(tensors)))


def slice_fragments(
    numel: int, first: int, slice_size: int, world_size: int
) -> tuple[Fragment, ...]:
    """Fragments of a tensor at ``first`` of a buffer that is split into equal slices (ZeRO 1, 2).

    Rank k holds elements [k * slice_size, (k + 1) * slice_size) of the buffer.
    """
    fragments = []
    for rank in range(first // slice_size, world_size):
        left = max(first, rank * slice_size)
        right = min(first + numel, (rank + 1) * slice_size)
        if left >= right:
            break
        fragments.append(Fragment(rank, left - first, left - rank * slice_size, right - left))
    return tuple(fragments)


def share_fragments(numel: int, share: int, offset: int, world_size: int) -> tuple[Fragment, ...]:
    """Fragments of a tensor that is split into equal shares by itself (ZeRO 3).

    Rank k holds elements [k * share, (k + 1) * share) at ``offset`` of its flat tensor; the last
    shares may be short or empty.
    """
    starts = ((rank, rank * share) for rank in range(world_size))
    return tuple(
        Fragment(rank, start, offset, min(share, numel - start))
        for rank, start in starts
        if start < numel
    )


def within(fragments: Iterable[Fragment], first: int, numel: int) -> tuple[Fragment, ...]:
    """Fragments of the elements [first, first + numel) of a tensor that lies in ``fragments``."""
    found = []
    for whole in fragments:
        left, right = max(first, whole.start), min(first + numel, whole.stop)
        if left < right:
            offset = whole.offset + left - whole.start
            found.append(Fragment(whole.rank, left - first, offset, right - left))
    return tuple(found)
