"""The interface of the adapters in engine/wrappers.py, and the parts that all of them share."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.kernels.stochastic_rounding import Run
from megalr.sharding.exchange import assign_owners
from megalr.sharding.fragment import UNCUT, Cut, FlatLayout, Fragment, Ranks, logical_tensors
from megalr.sharding.tensor_shard import shard_of

Place = tuple[str, list[Any]]
"""A file of the checkpoint and the keys that lead to something in it."""
Located = tuple[Tensor, Fragment]
"""A tensor of the optimizer and the elements of it that a parameter occupies on this rank."""

_UNREACHABLE = {
    "swap_optimizer": "zero_optimization.offload_optimizer.device nvme",
    "zenflow": "zero_optimization.zenflow",
    "round_robin_gradients": "zero_optimization.round_robin_gradients",
}


@dataclass(frozen=True, eq=False)
class Storage:
    """One tensor of the optimizer and the parameters whose masters lie in it.

    Attributes:
        flat: the tensor under which the base optimizer files its state.
        group: index into the base optimizer's ``param_groups``.
        parameters: each with the fragments of all ranks, in the optimizer's order.
        ranks: the processes over which the parameters are split.
    """

    flat: Tensor
    group: int
    parameters: tuple[tuple[nn.Parameter, tuple[Fragment, ...]], ...]
    ranks: Ranks


class Wrapper(ABC):
    """What the package needs to know of the engine's optimizer; one subclass per DeepSpeed class.

    Attributes:
        optimizer: DeepSpeed's wrapper, or the run's own optimizer where there is none.
        replicated: every rank holds every master entirely, each a tensor of its own (stage 0).
        splits_weights: the weights that the model computes with are split over ranks as well.
        sums_gradients: micro-batches are added up elsewhere than in ``.grad``.
        reads_marks_of_gradients: tensor-parallel marks are looked for on gradients.
    """

    replicated = False
    splits_weights = False
    sums_gradients = False
    reads_marks_of_gradients = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer

    @property
    def base(self) -> torch.optim.Optimizer:
        """The optimizer that makes the update (torch's AdamW, ...)."""
        base: torch.optim.Optimizer = self.optimizer.optimizer
        return base

    @abstractmethod
    def _storages(self) -> Iterator[Storage]:
        """Every tensor of the optimizer, in the order of its ``state_dict``."""

    @abstractmethod
    def _places(self, index: int) -> tuple[list[Any], list[Any]]:
        """Keys of the masters and of the optimizer state of the storage with this index."""

    # -- where elements lie -----------------------------------------------------------------

    @cached_property
    def storages(self) -> list[Storage]:
        """Every tensor of the optimizer, in the order of its ``state_dict``."""
        return list(self._storages())

    @cached_property
    def _found(self) -> dict[int, tuple[Storage, tuple[Fragment, ...]]]:
        return {id(p): (s, fragments) for s in self.storages for p, fragments in s.parameters}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.engine.module.named_parameters()}

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each of the optimizer's param groups, whole groups on every rank."""
        groups: list[list[nn.Parameter]] = [[] for _ in self.base.param_groups]
        for storage in self.storages:
            groups[storage.group] += [parameter for parameter, _ in storage.parameters]
        return groups

    def name(self, parameter: nn.Parameter) -> str:
        """Name within the engine's module."""
        return self._names[id(parameter)]

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return tuple(parameter.shape)

    def fragment(self, parameter: nn.Parameter) -> Located | None:
        """Where this rank's elements of a trained parameter lie; None if it holds none."""
        storage, fragments = self._found[id(parameter)]
        here = next((f for f in fragments if f.rank == storage.ranks.rank), None)
        return None if here is None else (storage.flat, here)

    def fragments(self, parameter: nn.Parameter) -> tuple[Tensor, tuple[Fragment, ...]]:
        """The tensor that holds a trained parameter on this rank, and all ranks' fragments."""
        storage, fragments = self._found[id(parameter)]
        return storage.flat, fragments

    @cached_property
    def layouts(self) -> dict[Tensor, FlatLayout]:
        """The layout of every tensor of the optimizer; logical tensors are numbered throughout."""
        layouts, number = {}, 1
        for storage in self.storages:
            tensors = []
            for parameter, fragments in storage.parameters:
                shape, cut = self.shape(parameter), self._cut(parameter)
                for tensor in logical_tensors(self.name(parameter), parameter, shape, fragments):
                    tensors.append(replace(tensor, number=number, cut=cut))
                    number += 1
            owned = assign_owners(tensors, storage.ranks.size)
            layouts[storage.flat] = FlatLayout(tuple(owned), storage.ranks)
        return layouts

    def _cut(self, parameter: nn.Parameter) -> Cut:
        """How tensor parallelism cuts each of the matrices in a parameter."""
        shard = shard_of(parameter)
        if shard is None or shard.dimension is None:
            return UNCUT
        return Cut(Ranks.of(self.engine.mpu.get_model_parallel_group()), shard.dimension)

    def layout(self, flat: Tensor) -> FlatLayout:
        """All ranks' fragments of the logical tensors in one tensor of the optimizer."""
        return self.layouts[flat]

    @cached_property
    def runs(self) -> dict[Tensor, tuple[Run, ...]]:
        """The numbers of the elements on this rank, for stochastic rounding.

        Whole parameters are counted through in the optimizer's order, so that a number depends on
        neither the ranks nor the ZeRO stage. A tensor-parallel shard counts from the number of its
        parameter on: shards draw the same, and what is replicated stays equal.
        """
        found: dict[Tensor, tuple[Run, ...]] = {}
        first = 0
        for storage in self.storages:
            runs: list[Run] = []
            for parameter, fragments in storage.parameters:
                here = next((f for f in fragments if f.rank == storage.ranks.rank), None)
                if here is not None:
                    runs.append((here.offset, first + here.start, here.numel))
                shard = shard_of(parameter)
                first += math.prod(shard.full_shape if shard else self.shape(parameter))
            found[storage.flat] = _joined(runs)
        return found

    def check_reachable(self) -> None:
        """Raise UserError where DeepSpeed keeps masters or states outside these tensors."""
        for attribute, key in _UNREACHABLE.items():
            if getattr(self.optimizer, attribute, False):
                raise UserError(
                    f"restarts cannot reach the optimizer state under {key}: "
                    "turn it off (offload to cpu is supported) or turn restarts off"
                )
        ratio = getattr(self.optimizer, "partial_offload", 1.0)
        if ratio != 1.0:
            raise UserError(
                f"restarts need zero_optimization.offload_optimizer.ratio 1.0, not {ratio}"
            )

    # -- weights ----------------------------------------------------------------------------

    @abstractmethod
    def refresh_weights(self) -> None:
        """Make the weights that the model computes with equal to the masters. Collective."""

    def relink(self) -> None:  # noqa: B027
        """Repair DeepSpeed's own access to optimizer states where a load breaks it."""

    def whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """A context in which the weight is whole on every rank. Collective."""
        return contextlib.nullcontext()

    def frozen_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """``(start, stop)`` of the elements of a frozen weight in this rank's files."""
        return 0, parameter.numel()

    def write_frozen(self, parameter: nn.Parameter, elements: Callable[[int, int], Tensor]) -> None:
        """Set this rank's part of a frozen weight; ``elements(start, stop)`` gives new values."""
        parameter.detach().view(-1).copy_(elements(0, parameter.numel()))

    # -- one step ---------------------------------------------------------------------------

    def step_result(self) -> tuple[Tensor | float, Tensor | bool]:
        """Norm of the averaged gradient before clipping, and whether the last update was skipped.

        Either may be a tensor on the device for which the host has not waited (the latter 1 or 0).
        Call it once, after the step of every update.
        """
        norm = self.engine.get_global_grad_norm()
        norm = float("nan") if norm is None else norm
        if self.engine.was_step_applied():  # as far as the engine knows
            return norm, getattr(self.optimizer, "skipped", False)
        self._after_skip()
        return norm, True

    def _after_skip(self) -> None:  # noqa: B027
        """Drop what a skipped step leaves behind."""

    # -- checkpoints ------------------------------------------------------------------------

    def checkpoint_places(self, flat: Tensor) -> tuple[Place, Place]:
        """Where this rank's files hold a tensor of masters, and the optimizer's state of it."""
        index = next(i for i, storage in enumerate(self.storages) if storage.flat is flat)
        file = self.model_file() if self.replicated else self.zero_file()
        masters, states = self._places(index)
        return (file, masters), (file, states)

    def frozen_place(self, parameter: nn.Parameter) -> Place:
        """Where this rank's files hold a frozen weight."""
        return self.model_file(), ["module", self.name(parameter)]

    def sub_group_sizes(self) -> list[int]:
        """Elements of the tensors of one param group where it has several; part of the layout."""
        return []

    def model_file(self) -> str:
        """Name of the file with this rank's weights; ranks with equal contents share it."""
        return Path(self.engine._get_ckpt_name("", "tag")).name

    def zero_file(self) -> str:
        """Name of the file with this rank's slices of masters and optimizer state."""
        return Path(self.engine._get_zero_ckpt_name("", "tag")).name


def _joined(runs: list[Run]) -> tuple[Run, ...]:
    """The runs in the order of their offsets, those that go on from one another as one."""
    joined: list[Run] = []
    for offset, first, count in sorted(runs):
        if joined:
            start, number, length = joined[-1]
            if start + length == offset and number + length == first:
                joined[-1] = (start, number, length + count)
                continue
        joined.append((offset, first, count))
    return tuple(joined)
