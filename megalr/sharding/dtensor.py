"""Where the elements of a DTensor lie, in the terms of :mod:`megalr.sharding.fragment`.

FSDP2 (``torch.distributed.fsdp.fully_shard``) turns every parameter into a DTensor that is split by
rows over a dimension of a device mesh, and may be replicated over others. That is a flat tensor of
its own, of which each rank holds the elements of its rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megalr.errors import UserError
from megalr.sharding.exchange import assign_owners
from megalr.sharding.fragment import (
    FlatLayout,
    Fragment,
    Ranks,
    logical_tensors,
    single_process_layout,
)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a DTensor, sharing its memory; any other tensor as it is, detached.

    Rows that this rank holds, contiguous; possibly none.
    """
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def row_fragments(tensor: torch.Tensor, name: str) -> tuple[Ranks, tuple[Fragment, ...]]:
    """The ranks that share a tensor, and the elements that each of them holds.

    A plain tensor is one fragment, whole on this rank. Of a DTensor of n rows over p ranks, rank k
    holds rows [k c, (k + 1) c) with c = ceil(n / p); the last ranks may hold fewer or none.

    Raises:
        UserError: the DTensor is split otherwise than by rows over one dimension of its mesh.
    """
    if not isinstance(tensor, DTensor):
        return Ranks(), (Fragment(0, 0, 0, tensor.numel()),)
    axes = [i for i, placed in enumerate(tensor.placements) if type(placed) is not Replicate]
    if len(axes) > 1 or any(not _by_rows(tensor.placements[i]) for i in axes):
        raise UserError(
            f"{name} is placed {tensor.placements}: megalr works with tensors that are split by "
            "rows over one dimension of the mesh, as fully_shard does by default"
        )
    if not axes:
        return Ranks(), (Fragment(0, 0, 0, tensor.numel()),)
    mesh, axis = tensor.device_mesh, axes[0]
    ranks = Ranks.of(mesh.get_group(axis))
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    share = -(-rows // ranks.size)
    parts = ((k, k * share, min(share, rows - k * share)) for k in range(ranks.size))
    return ranks, tuple(
        Fragment(rank, first * columns, 0, count * columns)
        for rank, first, count in parts
        if count > 0
    )


def _by_rows(placed: Placement) -> bool:
    """Not so for the strided shards of FSDP2 over tensor parallelism, a subclass of Shard."""
    return type(placed) is Shard and placed.dim == 0


def parameter_layout(
    parameter: torch.Tensor, name: str, first_number: int, loads: dict[int, list[float]]
) -> FlatLayout:
    """The layout of a parameter outside of an engine: this rank's part of it is the flat tensor.

    Split matrices get owners such that all ranks own about as many elements; ``loads`` (ranks to
    elements owned) has those of earlier parameters, and is increased.
    """
    if not isinstance(parameter, DTensor):
        return single_process_layout(parameter, name, first_number)
    ranks, fragments = row_fragments(parameter, name)
    load = loads.setdefault(ranks.size, [0.0] * ranks.size)
    tensors = logical_tensors(name, parameter, parameter.shape, fragments)
    owned = assign_owners(tensors, ranks.size, load)
    return FlatLayout(
        tuple(replace(tensor, number=first_number + i) for i, tensor in enumerate(owned)), ranks
    )


def local_shard(flat: torch.Tensor, parameter: DTensor) -> DTensor:
    """The elements of a parameter that this rank holds, 1-D, as a DTensor placed like it."""
    local = flat.view(parameter.to_local().shape)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def replica_groups(tensor: torch.Tensor) -> list[dist.ProcessGroup]:
    """The groups of ranks over which a DTensor is replicated (hybrid sharding); often none."""
    if not isinstance(tensor, DTensor):
        return []
    mesh = tensor.device_mesh
    return [
        mesh.get_group(axis)
        for axis, placed in enumerate(tensor.placements)
        if isinstance(placed, Replicate) and mesh.size(axis) > 1
    ]
