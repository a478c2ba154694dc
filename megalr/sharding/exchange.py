"""Bring cut matrices to their owners and results back: one collective each way and bucket.

Every rank of a layout's group calls these functions with the same tensors in the same order. The
amount of data follows from the layout, so nothing is negotiated. ``all_to_all_single`` moves only
what has to move: under ZeRO 1 and 2 that is the few matrices that a slice boundary happens to cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megalr.sharding.fragment import FlatLayout, LogicalTensor, Piece, piece_view

BUCKET_ELEMENTS = 32 * 1024 * 1024

Item = tuple[LogicalTensor, torch.Tensor]
"""A matrix and its whole gradient."""


def buckets(
    tensors: Sequence[LogicalTensor], limit: int = BUCKET_ELEMENTS
) -> Iterator[list[LogicalTensor]]:
    """Consecutive runs of tensors with at most ``limit`` elements together (at least one each)."""
    bucket: list[LogicalTensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel
    if bucket:
        yield bucket


def _device_of(layout: FlatLayout, like: torch.Tensor) -> torch.device:
    """Where collectives of the layout's group run: NCCL cannot take slices offloaded to the CPU."""
    if like.device.type == "cpu" and "nccl" in dist.get_backend(layout.group):
        return torch.device("cuda", torch.cuda.current_device())
    return like.device


def _all_to_all(
    parts: list[list[torch.Tensor]], counts: list[int], layout: FlatLayout, like: torch.Tensor
) -> list[torch.Tensor]:
    """Send ``parts[k]`` to rank k; returns what each rank sent here, flat, ``counts[k]`` long."""
    device = _device_of(layout, like)
    send = [part.reshape(-1) for rank_parts in parts for part in rank_parts]
    buffer = (torch.cat(send) if send else like.new_empty(0)).to(device)
    received = like.new_empty(sum(counts), device=device)
    dist.all_to_all_single(
        received,
        buffer,
        output_split_sizes=counts,
        input_split_sizes=[sum(part.numel() for part in rank_parts) for rank_parts in parts],
        group=layout.group,
    )
    return list(received.to(like.device).split(counts))


def collect(
    layout: FlatLayout, tensors: Sequence[LogicalTensor], flat: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Assemble, on each owner, the whole tensors it owns from all ranks' slices ``flat``.

    Returns name -> tensor of the logical shape, for the tensors owned by this rank only.
    """
    world, rank = range(layout.world_size), layout.rank
    if layout.world_size == 1:
        return {
            tensor.name: piece_view(flat, piece).view(tensor.shape)
            for tensor in tensors
            if tensor.owner == rank and (piece := tensor.piece_of(rank)) is not None
        }
    outgoing: list[list[torch.Tensor]] = [[] for _ in world]
    incoming: list[list[tuple[LogicalTensor, Piece]]] = [[] for _ in world]
    for tensor in tensors:
        for piece in tensor.pieces:
            if piece.rank == rank:
                outgoing[tensor.owner].append(piece_view(flat, piece))
            if tensor.owner == rank:
                incoming[piece.rank].append((tensor, piece))
    counts = [sum(piece.length for _, piece in pieces) for pieces in incoming]
    received = _all_to_all(outgoing, counts, layout, flat)
    whole = {t.name: flat.new_empty(t.numel) for t in tensors if t.owner == rank}
    for pieces, data in zip(incoming, received, strict=True):
        position = 0
        for tensor, piece in pieces:
            source = data.narrow(0, position, piece.length)
            whole[tensor.name].narrow(0, piece.start, piece.length).copy_(source)
            position += piece.length
    return {t.name: whole[t.name].view(t.shape) for t in tensors if t.owner == rank}


def distribute(
    layout: FlatLayout,
    tensors: Sequence[LogicalTensor],
    whole: Mapping[str, torch.Tensor],
    like: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The inverse of :func:`collect`: each rank receives its piece of every tensor.

    ``whole`` holds the tensors that this rank owns, in the dtype of ``like``. Returns name -> 1-D
    piece, for the tensors of which this rank holds elements.
    """
    rank = layout.rank
    if layout.world_size == 1:
        return {tensor.name: whole[tensor.name].reshape(-1) for tensor in tensors}
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(layout.world_size)]
    incoming: list[list[tuple[LogicalTensor, Piece]]] = [[] for _ in range(layout.world_size)]
    for tensor in tensors:
        for piece in tensor.pieces:
            if tensor.owner == rank:
                source = whole[tensor.name].reshape(-1)
                outgoing[piece.rank].append(source.narrow(0, piece.start, piece.length))
            if piece.rank == rank:
                incoming[tensor.owner].append((tensor, piece))
    counts = [sum(piece.length for _, piece in pieces) for pieces in incoming]
    received = _all_to_all(outgoing, counts, layout, like)
    pieces_here: dict[str, torch.Tensor] = {}
    for pieces, data in zip(incoming, received, strict=True):
        position = 0
        for tensor, piece in pieces:
            pieces_here[tensor.name] = data.narrow(0, position, piece.length)
            position += piece.length
    return pieces_here


def update_matrices(
    layout: FlatLayout,
    flat: torch.Tensor,
    grad: torch.Tensor,
    rule: Callable[[list[Item]], list[torch.Tensor]],
    apply: Callable[[list[torch.Tensor], list[torch.Tensor]], Any],
) -> None:
    """Update every matrix of a slice, each by its owner.

    ``rule`` turns (tensor, G) of whole matrices into their updates U, on the owner only; ``apply``
    changes the elements of weights that this rank holds by those of U, 1-D views. Both are called
    with as many matrices at a time as a bucket holds.
    """
    local = {tensor.name: piece for tensor, piece in layout.local}
    for bucket in buckets([t for t, _ in layout.local if layout.is_whole(t)]):
        pieces = [local[tensor.name] for tensor in bucket]
        items = [
            (tensor, piece_view(grad, piece).view(tensor.shape))
            for tensor, piece in zip(bucket, pieces, strict=True)
        ]
        updates = [update.reshape(-1) for update in rule(items)]
        apply([piece_view(flat, piece) for piece in pieces], updates)
    for bucket in buckets([t for t in layout.tensors if not layout.is_whole(t)]):
        matrices = collect(layout, bucket, grad)
        mine = [tensor for tensor in bucket if tensor.owner == layout.rank]
        found = rule([(tensor, matrices[tensor.name]) for tensor in mine])
        whole = {t.name: update.to(flat.dtype) for t, update in zip(mine, found, strict=True)}
        parts = distribute(layout, bucket, whole, flat)
        apply([piece_view(flat, local[name]) for name in parts], list(parts.values()))


def reduce_over_ranks(values: torch.Tensor, layout: FlatLayout, op: Any) -> torch.Tensor:
    """Complete per-tensor partial results over the group, in place; a no-op on one process."""
    if layout.world_size > 1:
        moved = values.to(_device_of(layout, values))
        dist.all_reduce(moved, op=op, group=layout.group)
        values.copy_(moved)
    return values
