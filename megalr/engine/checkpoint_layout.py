"""The contents of one rank's checkpoint files: where each parameter's part lies in which tensor.

DeepSpeed's files hold flat slices, in another arrangement for every kind of engine. The
description written beside them states it in one form for all kinds, in plain values, so that
reading (:mod:`megalr.checkpoint.reader`) knows nothing of the engine:

* ``flats``: each tensor of masters with the optimizer's state of it, as (file, keys to follow);
* ``parameters``: shape (of the tensor-parallel part), ``shard`` if tensor parallelism splits it,
  and the ``piece`` held here: (flat, offset in it, first element of the parameter, elements).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalr.engine.state import EngineState
from megalr.engine.wrappers import wrapper_of
from megalr.optim.base import ShardedOptimizer
from megalr.sharding.tensor_shard import shard_of


def layout_of(engine: Any) -> dict[str, Any]:
    """Facts that must be equal for the engine's own files to fit; plain values."""
    return {
        "data_parallel_size": engine.dp_world_size,
        "tensor_parallel_size": engine.mp_world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "wrapper": type(engine.optimizer).__name__,
        "sub_groups": wrapper_of(engine).sub_group_sizes(),
        "bf16": any(p.dtype == torch.bfloat16 for p in engine.module.parameters()),
    }


def fragments_file(data_rank: int, tensor_rank: int) -> str:
    """Name of the description of one rank's files."""
    return f"fragments_{data_rank:05d}_{tensor_rank:03d}.pt"


def describe_files(engine: Any) -> dict[str, Any]:
    """The description of this rank's files; see the module's docstring."""
    state = EngineState(engine)
    wrapper = state.wrapper
    flats: list[dict[str, Any]] = []
    number: dict[int, int] = {}
    for storage in wrapper.storages:
        master, optimizer_state = wrapper.checkpoint_places(storage.flat)
        number[id(storage.flat)] = len(flats)
        flats.append(
            {
                "numel": storage.flat.numel(),
                "master": master,
                "state": optimizer_state,
                "tensors": _logical_names(state.base, storage.flat),
            }
        )
    parameters: dict[str, Any] = {}
    for parameter in state.parameters():
        piece = None
        if (located := wrapper.fragment(parameter)) is not None:
            flat, fragment = located
            piece = [number[id(flat)], fragment.offset, fragment.start, fragment.numel]
        parameters[state.name(parameter)] = _record(parameter, state.shape(parameter), piece)
    for name, parameter in frozen_parameters(engine, state):
        start, stop = wrapper.frozen_range(parameter)
        place = wrapper.frozen_place(parameter)
        flats.append({"numel": stop - start, "master": place, "state": None, "tensors": []})
        piece = [len(flats) - 1, 0, start, stop - start] if start < stop else None
        parameters[name] = _record(parameter, wrapper.shape(parameter), piece)
    return {
        "flats": flats,
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


def _logical_names(base: torch.optim.Optimizer, flat: torch.Tensor) -> list[str]:
    """Names of the logical tensors in a flat one; only this package's optimizers have any."""
    if not isinstance(base, ShardedOptimizer):
        return []
    return [tensor.name for tensor in base.layout(flat).tensors]
