"""The ranks as a grid: tensor-parallel groups of neighbours, data parallelism across them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megalr.errors import UserError

Group = dist.ProcessGroup | None
"""A process group; None is a group of one rank, which needs no communication."""


@dataclass(frozen=True)
class Mesh:
    """Sizes, ranks and groups of one process: ``rank = data_rank * tensor_size + tensor_rank``.

    Neighbouring ranks (one machine, fast links) form a tensor-parallel group and read the same
    batches; ranks with equal rank in their tensor-parallel groups form a data-parallel group.
    The mesh has the interface of Megatron's ``mpu``, from which the engine takes its groups.

    Attributes:
        tensor_size, tensor_rank, tensor_group: tensor parallelism; the group is None for size 1.
        data_size, data_rank, data_group: data parallelism; the group always exists if
            torch.distributed is initialised.
    """

    tensor_size: int = 1
    tensor_rank: int = 0
    tensor_group: Group = None
    data_size: int = 1
    data_rank: int = 0
    data_group: Group = None

    # The interface of Megatron's mpu, under its names.
    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self.tensor_size

    def get_model_parallel_group(self) -> Group:
        """The tensor-parallel group; the engine gets a mesh only if there is one."""
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self.data_size

    def get_data_parallel_group(self) -> Group:
        """The data-parallel group."""
        return self.data_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


ONE_RANK = Mesh()
"""No parallelism."""


def check_tensor_size(tensor: int, world: int) -> None:
    """Raise UserError unless ``world`` ranks can be split into groups of ``tensor``."""
    if tensor > world or world % tensor:
        fitting = [size for size in range(1, world + 1) if world % size == 0]
        raise UserError(
            f"parallel.tensor {tensor} does not divide the {world} ranks of this start: use one of "
            f"{', '.join(map(str, fitting))}, or another number of ranks"
        )


def make_mesh(tensor: int, device_type: str) -> Mesh:
    """The mesh of all ranks with tensor-parallel groups of ``tensor`` ranks.

    A collective call: every rank of the initialised process group must make it.

    Raises:
        UserError: ``tensor`` does not divide the world; the sizes that do are named.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    check_tensor_size(tensor, world)
    if tensor == 1:
        return Mesh(data_size=world, data_rank=rank, data_group=dist.group.WORLD)
    grid = init_device_mesh(
        device_type, (world // tensor, tensor), mesh_dim_names=("data", "tensor")
    )
    return Mesh(
        tensor_size=tensor,
        tensor_rank=rank % tensor,
        tensor_group=grid.get_group("tensor"),
        data_size=world // tensor,
        data_rank=rank // tensor,
        data_group=grid.get_group("data"),
    )
