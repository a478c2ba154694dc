"""One adapter for each class that DeepSpeed wraps the run's optimizer in.

Where masters and optimizer states lie, how weights are refreshed from masters, which keys of which
file hold them, and whether a step was skipped depend on that class. Everything else in the package
asks the adapter, :func:`wrapper_of`. ``deepspeed.initialize`` replaces the parameters in
``param_groups`` by these tensors:

===================  ============================================  ==============================
adapter              entry of ``param_groups``                     contents
===================  ============================================  ==============================
:class:`Unwrapped`   the parameters                                whole tensors
:class:`Unfused`     an fp32 master of every parameter             whole tensors
:class:`BF16`        one slice of fp32 masters per group           equal slices of all tensors
:class:`ZeRO12`      one slice per group                           equal slices of all tensors
:class:`ZeRO3`       one slice per sub-group, present only in      an equal share of each tensor
                     ``step``
===================  ============================================  ==============================

The facts about DeepSpeed that this file relies on are in docs/dev/deepspeed-notes.md, each with a
test.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megalr.engine.wrapper import Place, Storage, Wrapper
from megalr.errors import UserError
from megalr.sharding.fragment import Fragment, Ranks, share_fragments, slice_fragments

_ATTRIBUTE = "megalr_wrapper"


def _alone(flat: Tensor, group: int, parameter: nn.Parameter) -> Storage:
    """A storage that is the master of one parameter."""
    return Storage(flat, group, ((parameter, (Fragment(0, 0, 0, flat.numel()),)),), Ranks())


class Unwrapped(Wrapper):
    """No wrapper: fp32 and ``paper_bf16`` without ZeRO; masters are the model's own weights."""

    replicated = True

    @property
    def base(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = self.optimizer
        return base

    def _storages(self) -> Iterator[Storage]:
        for index, group in enumerate(self.base.param_groups):
            for parameter in group["params"]:
                yield _alone(parameter, index, parameter)

    def refresh_weights(self) -> None:
        pass

    def _places(self, index: int) -> tuple[list[Any], list[Any]]:
        ((parameter, _),) = self.storages[index].parameters
        return ["module", self.name(parameter)], ["optimizer", "state", index]


class Unfused(Wrapper):
    """``FP16_UnfusedOptimizer``: bf16 without ZeRO, an fp32 master beside every weight."""

    replicated = True
    reads_marks_of_gradients = True

    def _storages(self) -> Iterator[Storage]:
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        for index, (weights, masters) in enumerate(pairs):
            for parameter, master in zip(weights, masters, strict=True):
                yield _alone(master, index, parameter)

    def refresh_weights(self) -> None:
        for storage in self.storages:
            ((parameter, _),) = storage.parameters
            parameter.detach().copy_(storage.flat.detach())

    def _places(self, index: int) -> tuple[list[Any], list[Any]]:
        group = self.storages[index].group
        first = next(i for i, storage in enumerate(self.storages) if storage.group == group)
        masters = ["optimizer", "fp32_groups", group, index - first]
        return masters, ["optimizer", "optimizer_state_dict", "state", index]


class _Sliced(Wrapper):
    """The tensors of a group lie end to end in a buffer, of which every rank has an equal slice."""

    @abstractmethod
    def _slices(self) -> Iterator[tuple[Tensor, list[nn.Parameter], list[nn.Parameter]]]:
        """Of every group: this rank's slice, its parameters, and these in the buffer's order."""

    def _storages(self) -> Iterator[Storage]:
        groups = self.optimizer.real_dp_process_group
        for index, (flat, parameters, in_buffer) in enumerate(self._slices()):
            ranks = Ranks.of(groups[index])
            first, lying = 0, {}
            for parameter in in_buffer:
                numel = parameter.numel()
                lying[id(parameter)] = slice_fragments(numel, first, flat.numel(), ranks.size)
                first += numel
            yield Storage(flat, index, tuple((p, lying[id(p)]) for p in parameters), ranks)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        self.optimizer.update_lp_params()

    def relink(self) -> None:
        """Link ``safe_get_full_optimizer_state`` to the states that there are now.

        megalr does not need it (it reads the base optimizer); users and the universal checkpoint
        may. DeepSpeed links states once, after the step of the first param group, when the others
        have none yet, and drops the links in ``load_checkpoint`` while marking them as present.
        """
        held = [s.flat for s in self.storages if self.layout(s.flat).local]
        if all(self.base.state.get(flat) for flat in held):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _places(self, index: int) -> tuple[list[Any], list[Any]]:
        outer = "optimizer_state_dict"
        masters = [outer, "single_partition_of_fp32_groups", index]
        return masters, [outer, "base_optimizer_state", "state", index]


class BF16(_Sliced):
    """``BF16_Optimizer``: bf16 weights at stage 1 with gradients added up in fp32."""

    sums_gradients = True

    def _slices(self) -> Iterator[tuple[Tensor, list[nn.Parameter], list[nn.Parameter]]]:
        groups = self.optimizer.bf16_groups
        return zip(self.optimizer.fp32_groups_flat_partition, groups, groups, strict=True)


class ZeRO12(_Sliced):
    """``DeepSpeedZeroOptimizer``: stages 1 and 2."""

    def _slices(self) -> Iterator[tuple[Tensor, list[nn.Parameter], list[nn.Parameter]]]:
        return zip(
            self.optimizer.single_partition_of_fp32_groups,
            self.optimizer.bit16_groups,
            self.optimizer.round_robin_bit16_groups,
            strict=True,
        )

    def _after_skip(self) -> None:
        """Drop gradient sums. DeepSpeed does so itself without offload; with it and bf16 they stay,
        the next micro-batches are added, and no step would ever be made again."""
        if getattr(self.optimizer, "cpu_offload", False):
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None


class ZeRO3(Wrapper):
    """``DeepSpeedZeroOptimizer_Stage3``: weights and masters in equal shares per parameter."""

    splits_weights = True

    def _storages(self) -> Iterator[Storage]:
        optimizer = self.optimizer
        for index, parameters in enumerate(optimizer.fp16_groups):
            ranks = Ranks.of(optimizer.sub_group_process_groups[index])
            offset, placed = 0, []
            for parameter in parameters:
                share = parameter.partition_numel()
                fragments = share_fragments(parameter.ds_numel, share, offset, ranks.size)
                placed.append((parameter, fragments))
                offset += share
            flat = optimizer.fp32_partitioned_groups_flat[index]
            yield Storage(flat, optimizer.sub_group_to_group_id[index], tuple(placed), ranks)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)  # type: ignore[attr-defined]  # .shape is empty

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """As the wrapper's own step does after the base optimizer's, for all sub-groups."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter])

    def frozen_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        share = parameter.partition_numel()  # type: ignore[attr-defined]
        rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        numel = parameter.ds_numel  # type: ignore[attr-defined]
        start = share * rank
        return start, max(start, min(start + share, numel))

    def write_frozen(self, parameter: nn.Parameter, elements: Callable[[int, int], Tensor]) -> None:
        start, stop = self.frozen_range(parameter)
        share = parameter.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
        if start < stop:
            share[: stop - start].copy_(elements(start, stop))
        if parameter.numel():  # a small one, which every rank keeps whole between steps
            super().write_frozen(parameter, elements)

    def frozen_place(self, parameter: nn.Parameter) -> Place:
        return self.model_file(), ["frozen_param_fragments", self.name(parameter)]

    def sub_group_sizes(self) -> list[int]:
        return [storage.flat.numel() for storage in self.storages]

    def _places(self, index: int) -> tuple[list[Any], list[Any]]:
        outer = "optimizer_state_dict"
        masters = [outer, "fp32_flat_groups", index]
        return masters, [outer, "optimizer_state_dict", "state", index]


def wrapper_of(engine: Any) -> Wrapper:
    """The adapter of the engine's optimizer; made once and kept on the engine.

    Raises:
        UserError: there is no optimizer, or it is wrapped in a class that megalr does not know.
    """
    made: Wrapper | None = vars(engine).get(_ATTRIBUTE)
    if made is None:
        made = _adapter_class(engine.optimizer)(engine)
        setattr(engine, _ATTRIBUTE, made)
    return made


def _adapter_class(optimizer: Any) -> type[Wrapper]:
    if optimizer is None:
        raise UserError("restarts need an engine with an optimizer; this one has none")
    if isinstance(optimizer, torch.optim.Optimizer):
        return Unwrapped
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    known: tuple[tuple[type, type[Wrapper]], ...] = (
        (FP16_UnfusedOptimizer, Unfused),
        (BF16_Optimizer, BF16),
        (DeepSpeedZeroOptimizer, ZeRO12),
        (DeepSpeedZeroOptimizer_Stage3, ZeRO3),
    )
    for theirs, ours in known:
        if isinstance(optimizer, theirs):
            return ours
    raise UserError(
        f"the optimizer wrapper {type(optimizer).__name__} is not supported: use a "
        "train.precision and zero_optimization.stage of docs/config.md"
    )
