"""Read a finished checkpoint of any ZeRO stage and tensor-parallel size in one process.

``open_checkpoint("runs/NAME")`` gives an object with the run's configuration, the counters, and
every parameter whole, in float32, read from the files on access.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalr.checkpoint.description import read_description
from megalr.checkpoint.directory import CHECKPOINTS, tags
from megalr.checkpoint.manifest import CheckpointManifest, Damaged, check_files, read_manifest
from megalr.checkpoint.source import MASTER, SavedState, StateSource, TensorState, whole
from megalr.checkpoint.torch_files import follow, load_mapped
from megalr.checkpoint.universal import UniversalFolder, is_universal
from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.sharding.tensor_shard import TensorShard


class NoSuchParameter(UserError, KeyError):
    """A parameter's name that the checkpoint does not have."""

    def __str__(self) -> str:  # KeyError would quote it
        return str(self.args[0])


class Checkpoint:
    """A finished checkpoint, opened; made by :func:`open_checkpoint`.

    Attributes:
        folder: its folder.
        manifest: its files, layout and validation loss.
        source: masters and optimizer states by parameter.
    """

    def __init__(self, folder: Path, manifest: CheckpointManifest, source: StateSource) -> None:
        self.folder = folder
        self.manifest = manifest
        self.source = source

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration when it was saved."""
        return self.source.saved.run_config()

    @property
    def update(self) -> int:
        """Updates done."""
        return self.source.saved.update

    @property
    def tokens(self) -> int:
        """Targets consumed."""
        return self.source.saved.tokens

    @property
    def state(self) -> dict[str, Any]:
        """State of the training loop; plain values."""
        return self.source.saved.state

    @property
    def validation_loss(self) -> float | None:
        """Validation loss at that update; None if it was not evaluated then."""
        return self.manifest.validation_loss

    def names(self) -> list[str]:
        """Names of all parameters of the decoder, in its order."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, padding included, tensor parallelism undone."""
        return self.source.shape(name)

    def parameter(self, name: str) -> Tensor:
        """A parameter whole, float32, on the CPU: the master if it is trained, else the weight.

        Raises:
            NoSuchParameter: there is no parameter of that name; the nearest names are given.
            Damaged: a file cannot be read.
        """
        names = self.names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
            raise NoSuchParameter(
                f"{self.folder} has no parameter {name!r}; there are {len(names)}, among them "
                f"{', '.join(near)}"
            )
        return whole(self.source, name).float()


def open_checkpoint(run_dir: Path | str, tag: str | None = None) -> Checkpoint:
    """Open a finished checkpoint of a run without torch.distributed or an engine.

    Args:
        run_dir: the run's folder (``runs/NAME``).
        tag: name of the checkpoint (``update_1000`` or ``update_1000_universal``); None for the
            newest finished one.

    Raises:
        UserError: there is no such run or checkpoint, it is unfinished, or the size of a file is
            not the recorded one (checksums are not computed here).
    """
    root = Path(run_dir) / CHECKPOINTS
    known = tags(root)
    if not known:
        raise UserError(f"{run_dir} holds no checkpoint: give the folder of a run (runs/NAME)")
    chosen = known[-1] if tag is None else tag
    if chosen not in known:
        raise UserError(f"{run_dir} has no checkpoint {tag}: it has {', '.join(known)}")
    folder = root / chosen
    try:
        manifest = read_manifest(folder)
        problem = check_files(folder, manifest.files, manifest.files, checksums=False)
        if problem is not None:
            raise Damaged(problem)
        return Checkpoint(folder, manifest, open_source(folder))
    except Damaged as error:
        others = [name for name in known if name != chosen]
        remedy = f"choose another one ({', '.join(others)})" if others else "there is no other"
        raise UserError(f"checkpoint {folder} is damaged ({error}): {remedy}") from error


def open_source(folder: Path) -> StateSource:
    """The saved state in a checkpoint's folder, plain or universal; raises Damaged."""
    return UniversalFolder(folder) if is_universal(folder) else ShardedFiles(folder)


class ShardedFiles:
    """The files written by the ranks of a run, assembled by their descriptions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = SavedState.read(folder)
        paths = sorted(folder.glob("fragments_*.pt"))
        if not paths:
            raise Damaged("it has no fragments_*.pt: it was written by something else")
        self._ranks: dict[int, list[dict[str, Any]]] = {}  # by tensor-parallel rank
        for path in paths:
            tensor_rank = path.stem.rsplit("_", 1)[1]
            if not tensor_rank.isdigit():
                raise Damaged(f"{path.name} is not the name of a description of a rank's files")
            self._ranks.setdefault(int(tensor_rank), []).append(read_description(path))
        self._first = self._ranks[min(self._ranks)][0]
        self._check_parameters()
        self._open = lru_cache(maxsize=None)(lambda name: load_mapped(folder / name))
        self._spread: tuple[int, dict[str, Tensor]] = (0, {})  # of the flat tensor read last
        self._logical = {rank: _logical_places(found) for rank, found in self._ranks.items()}

    def _check_parameters(self) -> None:
        """Every rank describes the same parameters, and each is sharded on all ranks or none."""
        first = {name: r["shard"] is None for name, r in self._first["parameters"].items()}
        for rank, descriptions in self._ranks.items():
            for description in descriptions:
                found = {n: r["shard"] is None for n, r in description["parameters"].items()}
                if found != first:
                    names = sorted(n for n in {*found, *first} if found.get(n) != first.get(n))
                    raise Damaged(f"tensor-parallel rank {rank} describes {names[0]} differently")

    def names(self) -> list[str]:
        return list(self._first["parameters"])

    def shape(self, name: str) -> tuple[int, ...]:
        record = self._first["parameters"][name]
        shard = record["shard"]
        return tuple(record["shape"] if shard is None else shard["full_shape"])

    def trained(self, name: str) -> bool:
        return bool(self._first["parameters"][name]["trained"])

    def element_states(self, name: str) -> list[str]:
        keys: list[str] = []
        for flat, _ in self._pieces(min(self._ranks), name):
            keys += [key for key in self._elementwise(flat) if key not in keys]
        return keys

    def scalars(self, name: str) -> dict[str, Any]:
        for flat, _ in self._pieces(min(self._ranks), name):
            state = self._state(flat)
            if state:
                return {
                    key: value
                    for key, value in state.items()
                    if not isinstance(value, dict)
                    and (not isinstance(value, Tensor) or value.dim() == 0)
                }
        return {}

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        if self._first["parameters"][name]["shard"] is None:
            return self._local(min(self._ranks), name, key, start, stop)
        full: Tensor | None = None
        for rank, descriptions in self._ranks.items():
            record = descriptions[0]["parameters"][name]
            shard = TensorShard.from_dict(record["shard"])
            local = self._local(rank, name, key, 0, math.prod(record["shape"]))
            if full is None:
                full = torch.zeros(shard.full_shape, dtype=local.dtype)
            shard.put(full, local.view(shard.local_shape))
        if full is None:
            raise Damaged(f"no rank holds {name}")
        return full.view(-1)[start:stop]

    def logical_tensors(self) -> list[str]:
        return [name for name in self._logical[min(self._ranks)] if self._holders(name)]

    def tensor_state(self, logical: str) -> TensorState:
        first, dim = min(self._ranks), self._first["cuts"].get(logical)
        found = self._local_state(first, logical)
        for key in self._first["matrix_elements"] if dim is not None else ():
            if key in found.matrix:
                states = [self._local_state(rank, logical) for rank in sorted(self._ranks)]
                found.matrix[key] = _joined([state.matrix.get(key) for state in states], dim)
        return found

    def _local_state(self, tensor_rank: int, logical: str) -> TensorState:
        """The state of the part that one tensor-parallel rank holds of a logical tensor."""
        found = TensorState()
        names = self._first["per_tensor_states"]
        for flat, index in self._logical[tensor_rank].get(logical, []):
            state = self._state(flat)
            found.averages |= {key: state[key][index] for key in names if key in state}
            found.matrix |= state.get("matrices", {}).get(logical, {})
        return found

    def _holders(self, logical: str) -> bool:
        state = self.tensor_state(logical)
        return bool(state.averages or state.matrix)

    def _pieces(self, tensor_rank: int, name: str) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """(flat, piece) of a parameter's part on every data-parallel rank that holds some."""
        for description in self._ranks[tensor_rank]:
            piece = description["parameters"][name]["piece"]
            if piece is not None:
                yield description["flats"][piece[0]], piece

    def _local(self, tensor_rank: int, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements of the part that one tensor-parallel rank holds of a parameter."""
        result: Tensor | None = None
        done = start
        for flat, (_, offset, first, numel) in self._pieces(tensor_rank, name):
            low, high = max(done, first), min(stop, first + numel)
            if low >= high:
                continue
            part = self._tensor(flat, key).view(-1)[offset + low - first : offset + high - first]
            if part.numel() != high - low:
                raise Damaged(f"{flat['master'][0]} holds too few elements of {name} ({key})")
            if low == start and high == stop:
                return part
            if low != done:
                break
            if result is None:
                result = torch.empty(stop - start, dtype=part.dtype)
            result[low - start : high - start] = part
            done = high
        if done != stop or result is None:
            raise Damaged(f"the files lack elements {done} to {stop} of {name} ({key})")
        return result

    def _tensor(self, flat: dict[str, Any], key: str) -> Tensor:
        if key == MASTER:
            file, keys = flat["master"]
            tensor = follow(self._open(file), keys)
        else:
            tensor = self._elementwise(flat).get(key)
        if not isinstance(tensor, Tensor):
            raise Damaged(f"{flat['master'][0]} holds no {key} where its description says")
        return tensor

    def _state(self, flat: dict[str, Any]) -> dict[Any, Any]:
        """The optimizer's state of a flat tensor; empty before the first update."""
        if flat["state"] is None:
            return {}
        file, keys = flat["state"]
        return follow(self._open(file), keys) or {}

    def _elementwise(self, flat: dict[str, Any]) -> dict[str, Tensor]:
        """States with one value per element of a flat tensor; masked ones are expanded."""
        if self._spread[0] == id(flat):
            return self._spread[1]
        state = self._state(flat)
        mask = state.get("mask")
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if key in self._first["per_tensor_states"]:
                continue
            if value.numel() == flat["numel"]:
                found[key] = value
            elif mask is not None:
                found[key] = value.new_zeros(flat["numel"]).masked_scatter_(mask.view(-1), value)
        self._spread = (id(flat), found)
        return found


def _logical_places(descriptions: list[dict[str, Any]]) -> dict[str, list[tuple[Any, int]]]:
    """Name of each logical tensor to the flat tensors that hold some of it, and its place there."""
    places: dict[str, list[tuple[Any, int]]] = {}
    for description in descriptions:
        for flat in description["flats"]:
            for index, name in enumerate(flat["tensors"]):
                places.setdefault(name, []).append((flat, index))
    return places


def _joined(parts: list[Any], dim: int) -> Tensor:
    """A matrix of the parts that the tensor-parallel ranks hold."""
    shapes = {tuple(part.shape) if isinstance(part, Tensor) else () for part in parts}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise Damaged(f"tensor-parallel ranks hold parts of shapes {sorted(shapes)} of one matrix")
    return torch.cat(parts, dim)
