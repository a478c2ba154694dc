"""The engine's own files of a checkpoint, and the description of their contents.

No rank fails alone while it writes, and reading runs no code of a file. DeepSpeed's files hold flat
slices, in another arrangement for every kind of engine. The description written beside them states
it in one form for all kinds, in plain values, so that :mod:`megalr.checkpoint.reader` knows nothing
of the engine:

* ``flats``: each tensor of masters with the optimizer's state of it, as (file, keys to follow);
* ``parameters``: shape (of the tensor-parallel part), ``shard`` if tensor parallelism splits it,
  and the ``piece`` held here: (flat, offset in it, first element of the parameter, elements);
* ``cuts``: the dimension along which tensor parallelism cuts a logical tensor, for those it cuts;
* ``per_tensor_states``, ``matrix_elements``: names of states, see ``ShardedOptimizer``.

DeepSpeed reads its files by ``torch.load(weights_only=False)``, which would run whatever somebody
has planted in a checkpoint; :func:`unpickle` does not.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megalr.engine.state import EngineState
from megalr.engine.wrappers import wrapper_of
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.sharding.fragment import LogicalTensor
from megalr.sharding.tensor_shard import shard_of

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def read_engine_files(engine: Any, root: Path, tag: str) -> bool:
    """Have the engine load its own files of ``root/tag``; False if it found none. Collective."""

    def load(path: str, map_location: Any = None) -> Any:
        return unpickle(path)  # to the CPU, as for every map_location that the engine passes

    engine.checkpoint_engine.load = load
    try:
        path, _ = engine.load_checkpoint(str(root), tag=tag)
    finally:
        del engine.checkpoint_engine.load
    return path is not None


def write_engine_files(
    engine: Any, root: Path, saving: Path
) -> tuple[Exception | None, list[Path]]:
    """Have the engine write its files; the first error here and the files of this rank.

    Inside ``save_checkpoint`` ranks wait for each other, so none may leave it by an exception:
    errors of writing are kept until all ranks are out.
    """
    errors: list[Exception] = []
    written: list[Path] = []
    plain, copy_scripts = engine.checkpoint_engine.save, engine._copy_recovery_script

    def save(state_dict: Any, path: str) -> None:
        try:
            if not errors:
                plain(state_dict, path)
                written.append(Path(path))
        except (OSError, RuntimeError) as error:
            errors.append(system_error(error, path))

    def copy(folder: str) -> None:
        try:
            copy_scripts(folder)
        except OSError as error:
            errors.append(error)

    engine.checkpoint_engine.save, engine._copy_recovery_script = save, copy
    try:
        engine.save_checkpoint(str(root), tag=saving.name, save_latest=False)
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script
    return (errors[0] if errors else None), written


def write_fragments(engine: Any, saving: Path) -> list[Path]:
    """Write the description of this rank's files, unless another rank's files hold the same."""
    data_rank = dist.get_rank(engine.seq_data_parallel_group) if dist.is_initialized() else 0
    if wrapper_of(engine).replicated and data_rank > 0:
        return []
    tensor_rank = engine.mpu.get_model_parallel_rank() if engine.mpu is not None else 0
    path = saving / fragments_file(data_rank, tensor_rank)
    write_tensors(describe_files(engine), path)
    return [path]


def counters(engine: Any) -> dict[str, int]:
    """The engine's own counts of steps and samples."""
    return {name: getattr(engine, name) for name in COUNTERS}


def set_counters(engine: Any, saved: dict[str, int]) -> None:
    """Continue the engine's counts from those of :func:`counters`."""
    for name in COUNTERS:
        setattr(engine, name, saved[name])


def layout_of(engine: Any) -> dict[str, Any]:
    """Facts that must be equal for the engine's own files to fit; plain values."""
    state = EngineState(engine)
    return {
        "data_parallel_size": engine.dp_world_size,
        "tensor_parallel_size": engine.mp_world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "wrapper": type(engine.optimizer).__name__,
        "sub_groups": wrapper_of(engine).sub_group_sizes(),
        "bf16": any(p.dtype == torch.bfloat16 for p in engine.module.parameters()),
        "groups": [sum(state.numel(p) for p in group) for group in state.groups()],
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
    cuts: dict[str, int] = {}
    for storage in wrapper.storages:
        master, optimizer_state = wrapper.checkpoint_places(storage.flat)
        number[id(storage.flat)] = len(flats)
        tensors = _logical_tensors(state.base, storage.flat)
        cuts |= {tensor.name: tensor.cut.dim for tensor in tensors if tensor.cut.ranks.size > 1}
        flats.append(
            {
                "numel": storage.flat.numel(),
                "master": master,
                "state": optimizer_state,
                "tensors": [tensor.name for tensor in tensors],
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
        "cuts": cuts,
        "per_tensor_states": list(getattr(state.base, "per_tensor_states", ())),
        "matrix_elements": list(getattr(state.base, "matrix_elements", ())),
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


def _logical_tensors(base: torch.optim.Optimizer, flat: torch.Tensor) -> tuple[LogicalTensor, ...]:
    """The logical tensors in a flat one; only this package's optimizers have any."""
    return base.layout(flat).tensors if isinstance(base, ShardedOptimizer) else ()


def unpickle(path: Path | str, mmap: bool = False) -> Any:
    """Read a file written by ``torch.save`` to the CPU.

    Accepts only tensors, plain values and the three plain classes that DeepSpeed writes.

    Args:
        path: the file.
        mmap: leave tensors on the disk until they are used, except in torch's legacy format. A
            mapping keeps the space of a deleted file allocated, so do not map tensors that are
            kept.

    Raises:
        pickle.UnpicklingError: the file holds something else.
        OSError, RuntimeError, EOFError, ValueError: it cannot be read.
    """
    # Reading a checkpoint without an engine does not import DeepSpeed before the first file.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    mmap = mmap and zipfile.is_zipfile(path)
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def write_tensors(value: Any, path: Path) -> None:
    """``torch.save``; a failure to write is an OSError.

    Raises:
        OSError: the system refused (disk full, no permission).
    """
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise system_error(error, path) from error


def system_error(error: Exception, path: Path | str) -> Exception:
    """The system's reason for a failed write of ``path``; ``error`` itself if none shows.

    torch's writer reports a full disk as "unexpected pos 576 vs 534". Writing on to the unusable
    file meets the same reason again.
    """
    if isinstance(error, OSError):
        return error
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found
    return error
