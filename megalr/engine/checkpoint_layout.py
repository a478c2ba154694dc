"""What one rank's files of a checkpoint hold: where each parameter's part lies in which tensor.

DeepSpeed's files hold flat slices, in another arrangement for every kind of engine. The
description written beside them says it once and for all kinds, in plain values, so that reading
(:mod:`megalr.checkpoint.reader`) knows nothing of DeepSpeed's classes:

* ``flats``: each tensor of masters with the optimizer's state of it, as (file, keys to follow);
* ``parameters``: shape (of the tensor-parallel part), ``shard`` if tensor parallelism cuts it, and
  the ``piece`` held here: (flat, offset in it, first element of the parameter, elements).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalr.engine.state import EngineState
from megalr.optim.base import ShardedOptimizer
from megalr.sharding.tensor_shard import shard_of

Place = tuple[str, list[Any]]
"""A file of the checkpoint and the keys that lead to something in it."""


def layout_of(engine: Any) -> dict[str, Any]:
    """What must be equal for the engine's own files to fit; plain values."""
    optimizer = engine.optimizer
    return {
        "data_parallel_size": engine.dp_world_size,
        "tensor_parallel_size": engine.mp_world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "wrapper": type(optimizer).__name__,
        "sub_groups": [
            flat.numel() for flat in getattr(optimizer, "fp32_partitioned_groups_flat", ())
        ],
        "bf16": any(p.dtype == torch.bfloat16 for p in engine.module.parameters()),
    }


def fragments_file(data_rank: int, tensor_rank: int) -> str:
    """Name of the description of one rank's files."""
    return f"fragments_{data_rank:05d}_{tensor_rank:03d}.pt"


def describe(engine: Any) -> dict[str, Any]:
    """The description of this rank's files; see the module's docstring."""
    state = EngineState(engine)
    flats = _flat_places(engine, state)
    number = {id(flat): index for index, (flat, _) in enumerate(flats)}
    records: list[dict[str, Any]] = []
    for flat, (master, optimizer_state) in flats:
        records.append(
            {
                "numel": flat.numel(),
                "master": master,
                "state": optimizer_state,
                "tensors": _logical_names(state.base, flat),
            }
        )
    parameters: dict[str, Any] = {}
    for parameter in state.parameters():
        slot = state.slot(parameter)
        piece = [number[id(slot.flat)], slot.offset, slot.start, slot.numel] if slot else None
        parameters[state.name(parameter)] = _record(parameter, state.shape(parameter), piece)
    for name, parameter in frozen_parameters(engine, state):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        start, numel = frozen_piece(parameter)
        records.append(_frozen_flat(engine, name, numel))
        piece = [len(records) - 1, 0, start, numel] if numel else None
        parameters[name] = _record(parameter, shape, piece)
    return {
        "flats": records,
        "parameters": parameters,
        "per_tensor_states": list(getattr(state.base, "per_tensor_states", ())),
    }


def frozen_parameters(engine: Any, state: EngineState) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the optimizer does not update, by name, in the order of the module."""
    trained = {id(parameter) for parameter in state.parameters()}
    return [(n, p) for n, p in engine.module.named_parameters() if id(p) not in trained]


def _record(
    parameter: nn.Parameter, shape: tuple[int, ...], piece: list[int] | None
) -> dict[str, Any]:
    shard = shard_of(parameter)
    return {
        "shape": list(shape),
        "shard": None if shard is None else shard.to_dict(),
        "trained": parameter.requires_grad,
        "piece": piece,
    }


def _flat_places(engine: Any, state: EngineState) -> list[tuple[torch.Tensor, tuple[Place, Place]]]:
    """Every flat tensor with the places of its masters and of its optimizer state."""
    flats = state.flats()
    optimizer = engine.optimizer
    if state.replicated:
        file = model_file(engine)
        if optimizer is state.base:  # plain fp32: the masters are the module's own tensors
            return [
                (
                    flat,
                    (
                        (file, ["module", state.name(parameters[0])]),
                        (file, ["optimizer", "state", index]),
                    ),
                )
                for index, (flat, parameters) in enumerate(flats)
            ]
        keys = [
            ["optimizer", "fp32_groups", group, index]
            for group, masters in enumerate(optimizer.fp32_groups)
            for index in range(len(masters))
        ]
        return [
            (flat, ((file, key), (file, ["optimizer", "optimizer_state_dict", "state", index])))
            for index, ((flat, _), key) in enumerate(zip(flats, keys, strict=True))
        ]
    file, outer = zero_file(engine), "optimizer_state_dict"
    masters, states = "single_partition_of_fp32_groups", "base_optimizer_state"
    if engine.zero_optimization_stage() == 3:
        masters, states = "fp32_flat_groups", "optimizer_state_dict"
    return [
        (flat, ((file, [outer, masters, index]), (file, [outer, states, "state", index])))
        for index, (flat, _) in enumerate(flats)
    ]


def _logical_names(base: torch.optim.Optimizer, flat: torch.Tensor) -> list[str]:
    """Names of the logical tensors in a flat one; only this package's optimizers have any."""
    if not isinstance(base, ShardedOptimizer):
        return []
    return [tensor.name for tensor in base.layout(flat).tensors]


def frozen_piece(parameter: nn.Parameter) -> tuple[int, int]:
    """(first element, number of elements) of a frozen parameter in this rank's files."""
    if not hasattr(parameter, "ds_id"):
        return 0, parameter.numel()
    piece = parameter.partition_numel()  # type: ignore[attr-defined]
    start = piece * torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    return start, max(0, min(piece, parameter.ds_numel - start))  # type: ignore[attr-defined]


def _frozen_flat(engine: Any, name: str, numel: int) -> dict[str, Any]:
    section = "frozen_param_fragments" if engine.zero_optimization_stage() == 3 else "module"
    place = (model_file(engine), [section, name])
    return {"numel": numel, "master": place, "state": None, "tensors": []}


def model_file(engine: Any) -> str:
    """Name of the file with this rank's weights; ranks without a part of their own share it."""
    return Path(engine._get_ckpt_name("", "tag")).name


def zero_file(engine: Any) -> str:
    """Name of the file with this rank's slices of masters and optimizer state."""
    return Path(engine._get_zero_ckpt_name("", "tag")).name
