"""Bring split matrices to the ranks that own them, and results back: one collective per direction.

Every rank calls these functions with the same tensors in the same order. The amounts of data follow
from the fragments, so nothing is negotiated. ``all_to_all_single`` moves only elements that have to
move: under ZeRO 1 and 2, for gradients, those of the few matrices that a slice boundary splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.sharding.fragment import FlatLayout, Fragment, LogicalTensor, Ranks

BUCKET_ELEMENTS = 32 * 1024 * 1024

T = TypeVar("T")
Item = tuple[LogicalTensor, Tensor]
"""A matrix and its whole gradient."""
Located = tuple[LogicalTensor, Tensor]
"""A tensor and the flat tensor (1-D) in which this rank's fragment of it lies."""


@dataclass(frozen=True)
class Slices:
    """A matrix that is zero but for some rows (``dim`` 0) or columns (1).

    Attributes:
        shape: ``(m, n)`` of the matrix.
        places: indices of the k slices, each once.
        values: ``(k, n)`` or ``(m, k)``.
    """

    shape: tuple[int, ...]
    dim: int
    places: Tensor
    values: Tensor

    def add_to(self, matrix: Tensor) -> Tensor:
        """Add them to a matrix that is whole, of any view, in place."""
        return matrix.view(self.shape).index_add_(
            self.dim, self.places, self.values.to(matrix.dtype)
        )

    def dense(self) -> Tensor:
        """The matrix ``(m, n)``."""
        return self.add_to(self.values.new_zeros(self.shape))


Change = Tensor | Slices
"""What is added to a matrix."""


def add_changes(weights: Sequence[Tensor], changes: Sequence[Change]) -> None:
    """Add to every weight its change; both 1-D, or the weight of Slices whole."""
    dense = [(w, c) for w, c in zip(weights, changes, strict=True) if isinstance(c, Tensor)]
    if dense:
        torch._foreach_add_([w for w, _ in dense], [c for _, c in dense])
    for weight, change in zip(weights, changes, strict=True):
        if isinstance(change, Slices):
            change.add_to(weight)


def least_loaded(
    costs: Sequence[float], candidates: Sequence[Sequence[int]], load: list[float]
) -> list[int]:
    """A rank for every cost: the highest first, each to the least loaded of its candidates.

    Of ranks that are equally loaded the first candidate is taken. Adds the costs to ``load`` (one
    number per rank). Deterministic, so all ranks find the same.
    """
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[index] = min(candidates[index], key=lambda rank: load[rank])
        load[chosen[index]] += costs[index]
    return chosen


def assign_owners(
    tensors: Sequence[LogicalTensor], world_size: int, load: list[float] | None = None
) -> list[LogicalTensor]:
    """Give every tensor an owner: its only holder, or the least loaded rank among its holders.

    Of the ranks that hold a split tensor, those with at least half of the largest fragment are
    candidates, which keeps the exchange small; the load of a rank is the elements that it owns.
    ``load`` has those of earlier tensors, and is increased.
    """
    load = [0.0] * world_size if load is None else load
    for tensor in tensors:
        if not tensor.is_split:
            load[tensor.fragments[0].rank] += tensor.numel
    split = [tensor for tensor in tensors if tensor.is_split]
    candidates = []
    for tensor in split:
        largest = max(fragment.numel for fragment in tensor.fragments)
        candidates.append([f.rank for f in tensor.fragments if 2 * f.numel >= largest])
    owners = iter(least_loaded([tensor.numel for tensor in split], candidates, load))
    return [replace(t, owner=next(owners) if t.is_split else t.fragments[0].rank) for t in tensors]


def buckets(
    items: Sequence[T], size_of: Callable[[T], float], limit: int = BUCKET_ELEMENTS
) -> Iterator[list[T]]:
    """Consecutive runs of items whose sizes sum to at most ``limit`` (at least one item each)."""
    bucket: list[T] = []
    filled = 0.0
    for item in items:
        if bucket and filled + size_of(item) > limit:
            yield bucket
            bucket, filled = [], 0.0
        bucket.append(item)
        filled += size_of(item)
    if bucket:
        yield bucket


def to_owner(ranks: Ranks, tensors: Sequence[Located], like: Tensor) -> dict[str, Tensor]:
    """Assemble, on each owner, the whole tensors that it owns from the fragments of all ranks.

    Returns name -> tensor of the logical shape, in the dtype and on the device of ``like``, for the
    tensors owned by this rank. A single process gets views if dtype and device are those already.
    """
    if ranks.size == 1:
        return {t.name: t.fragments[0].of(flat).to(like).view(t.shape) for t, flat in tensors}
    outgoing: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    incoming: list[list[tuple[str, Fragment]]] = [[] for _ in range(ranks.size)]
    for tensor, flat in tensors:
        for fragment in tensor.fragments:
            if fragment.rank == ranks.rank:
                outgoing[tensor.owner].append(fragment.of(flat))
            if tensor.owner == ranks.rank:
                incoming[fragment.rank].append((tensor.name, fragment))
    received = _all_to_all(ranks, outgoing, incoming, like)
    mine = [tensor for tensor, _ in tensors if tensor.owner == ranks.rank]
    whole = {tensor.name: like.new_empty(tensor.numel) for tensor in mine}
    for name, fragment, values in received:
        whole[name][fragment.start : fragment.stop] = values
    return {tensor.name: whole[tensor.name].view(tensor.shape) for tensor in mine}


def from_owner(
    ranks: Ranks, tensors: Sequence[LogicalTensor], whole: Mapping[str, Tensor], like: Tensor
) -> dict[str, Tensor]:
    """The inverse of :func:`to_owner`: each rank receives its fragment of every tensor.

    ``whole`` holds the tensors that this rank owns. Returns name -> 1-D fragment, in the dtype and
    on the device of ``like``, for the tensors of which this rank holds elements.
    """
    if ranks.size == 1:
        return {tensor.name: whole[tensor.name].reshape(-1) for tensor in tensors}
    outgoing: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    incoming: list[list[tuple[str, Fragment]]] = [[] for _ in range(ranks.size)]
    for tensor in tensors:
        for fragment in tensor.fragments:
            if tensor.owner == ranks.rank:
                values = whole[tensor.name].reshape(-1)[fragment.start : fragment.stop]
                outgoing[fragment.rank].append(values)
            if fragment.rank == ranks.rank:
                incoming[tensor.owner].append((tensor.name, fragment))
    return {name: values for name, _, values in _all_to_all(ranks, outgoing, incoming, like)}


def _all_to_all(
    ranks: Ranks,
    outgoing: list[list[Tensor]],
    incoming: list[list[tuple[str, Fragment]]],
    like: Tensor,
) -> list[tuple[str, Fragment, Tensor]]:
    """Send ``outgoing[k]`` to rank k; the values that arrive for the fragments ``incoming[k]``."""
    device = collective_device(ranks, like)
    send = [values.reshape(-1) for parts in outgoing for values in parts]
    buffer = torch.cat(send).to(device, like.dtype) if send else like.new_empty(0, device=device)
    counts = [sum(fragment.numel for _, fragment in parts) for parts in incoming]
    received = like.new_empty(sum(counts), device=device)
    dist.all_to_all_single(
        received,
        buffer,
        output_split_sizes=counts,
        input_split_sizes=[sum(values.numel() for values in parts) for parts in outgoing],
        group=ranks.group,
    )
    del buffer, send
    expected = [entry for parts in incoming for entry in parts]
    values = received.to(like.device).split([fragment.numel for _, fragment in expected])
    return [(*entry, part) for entry, part in zip(expected, values, strict=True)]


def broadcast_from_owners(ranks: Ranks, tensors: Sequence[Located]) -> None:
    """Give all ranks the owners' values where every rank holds every tensor whole (ZeRO 0)."""
    if ranks.group is None:
        return
    for owner in range(ranks.size):
        views = [t.fragments[0].of(flat) for t, flat in tensors if t.owner == owner]
        if not views:
            continue
        joined = torch.cat(views)
        dist.broadcast(joined, dist.get_global_rank(ranks.group, owner), group=ranks.group)
        if owner != ranks.rank:
            for view, part in zip(views, joined.split([v.numel() for v in views]), strict=True):
                view.copy_(part)


@dataclass(frozen=True)
class MatrixUpdate:
    """The update of all matrices in one flat tensor.

    ``rule`` turns (tensor, G) of whole matrices into their updates U, on the owner only; ``apply``
    changes the elements of weights that this rank holds by those of U, 1-D views, or by Slices of
    weights that it holds whole. Both are called with some of the matrices at a time.

    ``together``: updates with the same value have the same ``rule`` and ``apply``, which are called
    with matrices of all of them; None: no others have. ``worked_on``: the share of the elements of
    a matrix that ``rule`` needs memory for, so that more of them fit a bucket.
    """

    layout: FlatLayout
    flat: Tensor
    grad: Tensor
    rule: Callable[[list[Item]], Sequence[Change]]
    apply: Callable[[list[Tensor], list[Any]], Any]
    together: int | None = None
    worked_on: float = 1.0

    @property
    def kind(self) -> int:
        """Equal for updates whose rule and apply are the same."""
        return id(self) if self.together is None else self.together

    def local(self, tensor: LogicalTensor) -> Tensor | None:
        """This rank's elements of a weight, 1-D; None if it holds none."""
        fragment = tensor.on(self.layout.ranks.rank)
        return None if fragment is None else fragment.of(self.flat)


def update_matrices(updates: Sequence[MatrixUpdate]) -> None:
    """Update every matrix of some flat tensors, each by its owner.

    Owners work at the same time: the split matrices of all flat tensors are exchanged in common
    buckets, where the ranks and dtypes are the same. Every rank gives the same flat tensors.
    Matrices of equal shape come one after the other, so that rules can stack most of a bucket.
    """
    same: dict[int, list[MatrixUpdate]] = {}
    for update in updates:
        same.setdefault(update.kind, []).append(update)
    for members in same.values():
        whole = [(t, f, u) for u in members for t, f in u.layout.local if not t.is_split]
        whole.sort(key=lambda entry: entry[0].shape)
        for bucket in buckets(whole, _memory_of):
            _update_whole(bucket)
    alike: dict[Any, list[tuple[LogicalTensor, MatrixUpdate]]] = {}
    for update in updates:
        key = (id(update.layout.ranks.group), update.grad.dtype, update.flat.dtype)
        split = [(tensor, update) for tensor in update.layout.tensors if tensor.is_split]
        alike.setdefault(key, []).extend(split)
    for entries in alike.values():
        entries.sort(key=lambda entry: entry[0].shape)
        for part in buckets(entries, lambda entry: entry[0].numel):
            _update_split(part)


def _memory_of(entry: tuple[LogicalTensor, Fragment, MatrixUpdate]) -> float:
    """Elements that the rule needs memory for; all of a matrix that tensor parallelism cuts."""
    tensor, _, update = entry
    return tensor.numel * (update.worked_on if tensor.cut.ranks.size == 1 else 1)


def _update_whole(bucket: list[tuple[LogicalTensor, Fragment, MatrixUpdate]]) -> None:
    """Update matrices of one kind that this rank holds entirely."""
    first = bucket[0][2]
    found = first.rule([(t, f.of(u.grad).view(t.shape)) for t, f, u in bucket])
    weights = [f.of(u.flat) for _, f, u in bucket]
    first.apply(weights, [x if isinstance(x, Slices) else x.reshape(-1) for x in found])


def _update_split(bucket: list[tuple[LogicalTensor, MatrixUpdate]]) -> None:
    """Update matrices that several ranks hold: gradients to the owners, updates back."""
    first = bucket[0][1]
    ranks = first.layout.ranks
    of_kind: dict[int, list[tuple[LogicalTensor, MatrixUpdate]]] = {}
    for entry in bucket:
        of_kind.setdefault(entry[1].kind, []).append(entry)
    matrices = to_owner(ranks, [(tensor, update.grad) for tensor, update in bucket], first.grad)
    whole: dict[str, Tensor] = {}
    for entries in of_kind.values():
        mine = [tensor for tensor, _ in entries if tensor.owner == ranks.rank]
        found = entries[0][1].rule([(tensor, matrices[tensor.name]) for tensor in mine])
        dense = [x.dense() if isinstance(x, Slices) else x for x in found]
        whole |= {tensor.name: matrix for tensor, matrix in zip(mine, dense, strict=True)}
    parts = from_owner(ranks, [tensor for tensor, _ in bucket], whole, first.flat)
    for entries in of_kind.values():
        held = [(update.local(tensor), tensor.name) for tensor, update in entries]
        here = [(weight, parts[name]) for weight, name in held if weight is not None]
        entries[0][1].apply([weight for weight, _ in here], [part for _, part in here])


def collective_device(ranks: Ranks, like: Tensor) -> torch.device:
    """Where collectives run: NCCL cannot take tensors that are offloaded to the CPU."""
    if like.device.type == "cpu" and "nccl" in dist.get_backend(ranks.group):
        return torch.device("cuda", torch.cuda.current_device())
    return like.device


def reduce_over_ranks(values: Tensor, ranks: Ranks, op: Any) -> Tensor:
    """Complete per-tensor partial results over the ranks, in place; a no-op on one process."""
    if ranks.size > 1:
        moved = values.to(collective_device(ranks, values))
        dist.all_reduce(moved, op=op, group=ranks.group)
        values.copy_(moved)
    return values
