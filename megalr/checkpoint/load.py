"""Load a checkpoint of any shape into an engine of any other.

Where the layouts are equal the engine reads its own files. Otherwise masters are copied into the
engine's own tensors, the base optimizer's state is made again, and the weights that the model
computes with are refreshed from the masters. Every rank reads only what it holds (under tensor
parallelism: whole tensors, of which it takes its part).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalr.checkpoint.directory import CHECKPOINTS
from megalr.checkpoint.find import try_manifest
from megalr.checkpoint.manifest import Damaged
from megalr.checkpoint.reader import open_source
from megalr.checkpoint.source import MASTER, SavedState, StateSource, whole
from megalr.distributed.agreement import run_on_all, run_on_rank0
from megalr.engine.checkpoint_files import (
    frozen_parameters,
    layout_of,
    read_engine_files,
    set_counters,
)
from megalr.engine.state import EngineState
from megalr.errors import AgreedError, UserError
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.sharding.fragment import LogicalTensor
from megalr.sharding.tensor_shard import shard_of


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_checkpoint` brought back.

    Attributes:
        state: what was given to :func:`save_checkpoint`, with ``update``.
        seconds: the time it took.
        reshaped: which parts of the layout differ, as ``{name: [saved, now]}``; empty if the
            engine read its own files.
    """

    state: dict[str, Any]
    seconds: float
    reshaped: dict[str, list[Any]]


def load_checkpoint(engine: Any, folder: Path, tag: str) -> Loaded:
    """Load a good checkpoint (:func:`find_checkpoint`) into the engine, whatever shape it has.

    Where layouts are equal the engine reads its own files and continues bitwise; otherwise masters
    and optimizer states are assembled from the files and split for this engine. Options of the
    optimizer (betas, weight decay, ...) stay those of the engine, not those that were saved.

    Raises:
        UserError: it cannot be loaded into this engine; the reason is named.
    """
    started = time.perf_counter()
    root = folder / CHECKPOINTS
    manifest, problem = run_on_rank0(lambda: try_manifest(root / tag))
    if manifest is None:
        raise AgreedError(f"checkpoint {root / tag} is damaged ({problem}): choose another one")
    now = json.loads(json.dumps(layout_of(engine)))
    before = {"groups": now["groups"], **manifest.layout}  # which older checkpoints do not have
    different = {k: [before.get(k), v] for k, v in now.items() if before.get(k) != v}
    saved = run_on_all(lambda: SavedState.read(root / tag), Damaged)
    options = [dict(group) for group in EngineState(engine).base.param_groups]
    if different:
        run_on_all(lambda: load_source(engine, open_source(root / tag)), Damaged)
        EngineState(engine).refresh_weights()
    elif not read_engine_files(engine, root, tag):
        raise AgreedError(f"checkpoint {root / tag} could not be loaded by DeepSpeed")
    for group, given in zip(EngineState(engine).base.param_groups, options, strict=True):
        group.update({key: value for key, value in given.items() if key != "params"})
    return Loaded(dict(saved.state, update=saved.update), time.perf_counter() - started, different)


def load_weights(engine: Any, folder: Path, tag: str) -> None:
    """Load the weights alone of a good checkpoint into a new engine. Collective.

    Masters are the checkpoint's, or their values rounded to the dtype of this engine's; optimizer
    and counters stay new.

    Raises:
        UserError: it is of another model.
    """
    root = folder / CHECKPOINTS
    run_on_all(lambda: load_source(engine, open_source(root / tag), weights_only=True), Damaged)
    EngineState(engine).refresh_weights()


@torch.no_grad()
def load_source(engine: Any, source: StateSource, weights_only: bool = False) -> None:
    """Load what this rank holds: masters, frozen weights, optimizer state, the engine's counters.

    ``weights_only``: no optimizer state and no counters.
    Not collective: once all ranks have agreed that it worked, ``EngineState.refresh_weights``
    must be called on all of them.

    Raises:
        UserError: the model is another one, or the counters do not fit this ZeRO stage; the same
            on all ranks.
        Damaged: a file cannot be read, on the ranks that read it.
    """
    state = EngineState(engine)
    _check_model(engine, state, source)
    for parameter in state.parameters():
        master = state.master(parameter)
        if master is not None:
            start, stop = state.held(parameter)
            master.copy_(_part(source, state.name(parameter), parameter, MASTER, start, stop))
    for name, parameter in frozen_parameters(engine, state):
        state.wrapper.write_frozen(parameter, partial(_part, source, name, parameter, MASTER))
    if weights_only:
        return
    for storage in state.wrapper.storages:
        flat, parameters = storage.flat, [parameter for parameter, _ in storage.parameters]
        found = _flat_state(state, source, flat, parameters)
        state.base.state.pop(flat, None)
        if found:
            state.base.state[flat] = found
    set_counters(engine, source.saved.engine)


def _check_model(engine: Any, state: EngineState, source: StateSource) -> None:
    """Reject a saved state of other parameters; every rank decides from the same facts."""
    expected = {state.name(p): (_full_shape(p, state.shape(p)), True) for p in state.parameters()}
    for name, parameter in frozen_parameters(engine, state):
        expected[name] = (_full_shape(parameter, state.shape(parameter)), False)
    saved = {name: (source.shape(name), source.trained(name)) for name in source.names()}
    for name in [*expected, *saved]:
        if expected.get(name) != saved.get(name):
            raise UserError(
                f"the checkpoint is of another model: {name} is {_shown(saved.get(name))} there "
                f"and {_shown(expected.get(name))} here; give the model and method it was made with"
            )


def _shown(facts: tuple[tuple[int, ...], bool] | None) -> str:
    if facts is None:
        return "absent"
    return f"{'trained' if facts[1] else 'frozen'} of shape {list(facts[0])}"


def _full_shape(parameter: nn.Parameter, shape: tuple[int, ...]) -> tuple[int, ...]:
    shard = shard_of(parameter)
    return shape if shard is None else shard.full_shape


def _part(
    source: StateSource, name: str, parameter: nn.Parameter, key: str, start: int, stop: int
) -> Tensor:
    """Elements [start, stop) of this tensor-parallel rank's part of a parameter."""
    shard = shard_of(parameter)
    if shard is None:
        return source.elements(name, key, start, stop)
    return shard.take(whole(source, name, key)).reshape(-1)[start:stop]


def _flat_state(
    state: EngineState, source: StateSource, flat: Tensor, parameters: list[nn.Parameter]
) -> dict[str, Any]:
    """The base optimizer's state of one flat tensor."""
    located = [(p, state.wrapper.fragment(p)) for p in parameters]
    result = _counters(state, source, flat, parameters)
    first = state.name(parameters[0])
    # This package's optimizers keep flat states, torch's the shape of the tensor.
    shape = (flat.numel(),) if isinstance(state.base, ShardedOptimizer) else flat.shape
    for key in source.element_states(first):
        dtype = source.elements(first, key, 0, 1).dtype
        result[key] = torch.zeros(shape, dtype=dtype, device=flat.device)  # padding is zero too
        for parameter, here in located:
            if here is not None:
                start, stop = here[1].start, here[1].stop
                part = _part(source, state.name(parameter), parameter, key, start, stop)
                here[1].of(result[key].view(-1)).copy_(part)
    mask = result.get("mask")
    if mask is not None:  # SPAM with a density keeps the moments of the mask's elements only
        for key in result.keys() & {"exp_avg", "exp_avg_sq"}:
            result[key] = result[key][mask]
    result |= _whole_tensor_states(state, source, flat)
    return result


def _counters(
    state: EngineState, source: StateSource, flat: Tensor, parameters: list[nn.Parameter]
) -> dict[str, Any]:
    """The counters that all parameters of a flat tensor share.

    Raises:
        UserError: they do not share them: a shape that keeps one a parameter was saved, and here
            one serves many.
    """
    first = source.scalars(state.name(parameters[0]))
    for parameter in parameters[1:]:
        other = source.scalars(state.name(parameter))
        if {k: float(v) for k, v in other.items()} != {k: float(v) for k, v in first.items()}:
            raise UserError(
                f"the optimizer's counters of {state.name(parameters[0])} and "
                f"{state.name(parameter)} differ in the checkpoint, and here one serves both: "
                "continue with the ZeRO stage and the restarts.reset_scope it was saved with"
            )
    settings = state.base.defaults
    on_device = bool(settings.get("fused") or settings.get("capturable"))
    return {
        key: value.clone().to(flat.device if on_device else "cpu")
        if isinstance(value, Tensor)
        else value
        for key, value in first.items()
    }


def _whole_tensor_states(state: EngineState, source: StateSource, flat: Tensor) -> dict[str, Any]:
    """What the optimizer keeps for whole tensors: averages on all ranks, matrices on owners."""
    if not isinstance(state.base, ShardedOptimizer):
        return {}
    layout = state.base.layout(flat)
    states = {tensor.name: source.tensor_state(tensor.name) for tensor in layout.tensors}
    result: dict[str, Any] = {}
    for key in getattr(state.base, "per_tensor_states", ()):
        if all(key in states[tensor.name].averages for tensor in layout.tensors):
            averages = [states[tensor.name].averages[key] for tensor in layout.tensors]
            result[key] = torch.stack(averages).to(flat.device)
    matrices = {
        tensor.name: {
            key: _held(value, tensor if key in state.base.matrix_elements else None, flat.device)
            for key, value in states[tensor.name].matrix.items()
        }
        for tensor in layout.tensors
        if tensor.owner == layout.ranks.rank and states[tensor.name].matrix
    }
    if any(states[tensor.name].matrix for tensor in layout.tensors):
        result["matrices"] = matrices
    return result


def _held(value: Any, tensor: LogicalTensor | None, device: torch.device) -> Any:
    """What this rank holds of a matrix's state; ``tensor``: the matrix, if cut like it."""
    if not isinstance(value, Tensor):
        return value
    return (value if tensor is None else tensor.cut.part(value)).to(device, copy=True)
