"""Describe to an optimizer of this package what DeepSpeed's flat slices hold.

``deepspeed.initialize`` replaces the parameters in ``param_groups`` by flat fp32 tensors:

=======================  ==============================================  =======================
engine                   entry of ``param_groups``                       what it holds
=======================  ==============================================  =======================
ZeRO 1, 2                one slice a group                               equal cut of all tensors
BF16_Optimizer (ZeRO 1   one slice a group                               equal cut of all tensors
with fp32 accumulation)
ZeRO 3                   one slice a sub-group, shown only in ``step``   a share of each tensor
stage 0, bf16            an fp32 copy of every parameter                 whole tensors
stage 0, fp32 and        the parameters                                  whole tensors
paper_bf16
=======================  ==============================================  =======================

Everything that depends on DeepSpeed's internals is in this file (docs/dev/deepspeed-notes.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megalr.errors import UserError
from megalr.optim.base import ShardedOptimizer
from megalr.optim.loro import LORO
from megalr.optim.matrix import MatrixOptimizer
from megalr.optim.muon import Muon
from megalr.optim.spam import SPAM
from megalr.optim.stable_spam import StableSPAM
from megalr.sharding.fragment import (
    FlatLayout,
    LogicalTensor,
    Piece,
    assign_owners,
    cut_each,
    cut_over_slices,
    split_rows,
)

WHOLE_MATRIX = (MatrixOptimizer, LORO, Muon)


def attach_layouts(engine: Any) -> None:
    """Hand the layouts of the engine's flat storages to its optimizer, right after initialize.

    Does nothing for optimizers that need none (torch's AdamW). Raises UserError for a whole-matrix
    optimizer at stage 0 on several ranks: every rank would keep all states and repeat every
    decomposition, and ranks whose results differ in the last digit would drift apart in silence.
    Raises it too for an optimizer that looks at whole tensors under tensor parallelism.
    """
    wrapper = engine.optimizer
    base = getattr(wrapper, "optimizer", wrapper)
    if not isinstance(base, ShardedOptimizer):
        return
    _refuse_tensor_parallelism(engine, base)
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        layouts = _stage3(wrapper, names)
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):
        layouts = _slices(
            wrapper.single_partition_of_fp32_groups,
            wrapper.bit16_groups,
            [
                {id(p): offset for p, offset in zip(group, offsets, strict=True)}
                for group, offsets in zip(
                    wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True
                )
            ],
            wrapper.real_dp_process_group,
            names,
        )
    elif hasattr(wrapper, "fp32_groups_flat_partition"):
        layouts = _slices(
            wrapper.fp32_groups_flat_partition,
            wrapper.bf16_groups,
            [_consecutive_offsets(group) for group in wrapper.bf16_groups],
            wrapper.real_dp_process_group,
            names,
        )
    else:
        shared = dist.is_initialized() and dist.get_world_size(engine.data_parallel_group) > 1
        if shared and isinstance(base, WHOLE_MATRIX):
            raise UserError(
                f"{type(base).__name__} works on whole matrices and shares them out over the ranks "
                "through ZeRO: zero_optimization.stage is 0 with several ranks, use stage 1 or more"
            )
        layouts = _whole(wrapper, base, names)
    base.attach_layouts(layouts)


def _refuse_tensor_parallelism(engine: Any, base: ShardedOptimizer) -> None:
    """A tensor-parallel rank holds a part of a matrix: its SVD, norm or maximum are not those."""
    mpu = getattr(engine, "mpu", None)
    size = 1 if mpu is None else mpu.get_model_parallel_world_size()
    masked = isinstance(base, SPAM) and any(
        g["density"] not in (None, 1) for g in base.param_groups
    )
    if size > 1 and (masked or isinstance(base, (*WHOLE_MATRIX, StableSPAM))):
        raise UserError(
            f"{type(base).__name__} looks at whole tensors and tensor parallelism over {size} "
            "ranks cuts them: use data parallelism for it, or adamw or spam (density 1)"
        )


def _consecutive_offsets(parameters: Sequence[nn.Parameter]) -> dict[int, int]:
    offsets, position = {}, 0
    for parameter in parameters:
        offsets[id(parameter)] = position
        position += parameter.numel()
    return offsets


def _rank_and_size(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def _slices(
    flats: Sequence[torch.Tensor],
    groups: Sequence[Sequence[nn.Parameter]],
    offsets: Sequence[dict[int, int]],
    process_groups: Sequence[dist.ProcessGroup],
    names: dict[int, str],
) -> dict[torch.Tensor, FlatLayout]:
    """ZeRO 1 and 2: the group's tensors one after the other, the buffer cut into equal slices."""
    layouts, number = {}, 1
    for flat, parameters, starts, group in zip(flats, groups, offsets, process_groups, strict=True):
        rank, world_size = _rank_and_size(group)
        tensors = []
        for parameter in parameters:
            for name, shape, first in split_rows(
                names[id(parameter)], parameter.shape, getattr(parameter, "row_blocks", None)
            ):
                start = starts[id(parameter)] + first
                pieces = cut_over_slices(math.prod(shape), start, flat.numel(), world_size)
                tensors.append(LogicalTensor(name, shape, pieces, number=number))
                number += 1
        owned = tuple(assign_owners(tensors, world_size))
        layouts[flat] = FlatLayout(owned, rank, world_size, group)
    return layouts


def _stage3(wrapper: Any, names: dict[int, str]) -> dict[torch.Tensor, FlatLayout]:
    """ZeRO 3: every parameter is cut into equal shares; a slice holds one share of each."""
    layouts, number = {}, 1
    for flat, parameters, group in zip(
        wrapper.fp32_partitioned_groups_flat,
        wrapper.fp16_groups,
        wrapper.sub_group_process_groups,
        strict=True,
    ):
        rank, world_size = _rank_and_size(group)
        tensors, offset = [], 0
        for parameter in parameters:
            share = parameter.partition_numel()
            for name, shape, first in split_rows(
                names[id(parameter)], parameter.ds_shape, getattr(parameter, "row_blocks", None)
            ):
                pieces = cut_each(first, math.prod(shape), share, offset, world_size)
                tensors.append(LogicalTensor(name, shape, pieces, number=number))
                number += 1
            offset += share
        owned = tuple(assign_owners(tensors, world_size))
        layouts[flat] = FlatLayout(owned, rank, world_size, group)
    return layouts


def _whole(
    wrapper: Any, base: ShardedOptimizer, names: dict[int, str]
) -> dict[torch.Tensor, FlatLayout]:
    """Stage 0: the optimizer holds whole tensors, its own copies or the parameters themselves."""
    masters = [p for group in base.param_groups for p in group["params"]]
    parameters = masters
    if hasattr(wrapper, "fp16_groups"):
        parameters = [p for group in wrapper.fp16_groups for p in group]
    layouts, number = {}, 1
    for master, parameter in zip(masters, parameters, strict=True):
        tensors = []
        for name, shape, first in split_rows(
            names[id(parameter)], parameter.shape, getattr(parameter, "row_blocks", None)
        ):
            piece = Piece(0, 0, first, math.prod(shape))
            tensors.append(LogicalTensor(name, shape, (piece,), 0, number))
            number += 1
        layouts[master] = FlatLayout(tuple(tensors))
    return layouts
