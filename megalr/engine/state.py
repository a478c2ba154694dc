"""Access to the parameters' masters and optimizer states inside a DeepSpeed engine.

Everything that depends on DeepSpeed's internals is in this file; its facts are listed
in docs/dev/deepspeed-notes.md, with tests. What a rank holds of a parameter is a *fragment*: the
elements [start, start + numel) of the flattened parameter, as 1-D views of the fp32 master (the
truth; bf16 with ``paper_bf16``) and of every per-element optimizer state. Under ZeRO fragments of
different ranks do not overlap; at stage 0 every rank holds everything.

Optimizer states are read from the base optimizer at every call, never cached: they do not exist
before the first update, and loading a checkpoint replaces their tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.sharding.tensor_shard import shard_of

# Names of per-element states, over the optimizers of torch, DeepSpeed and megalr. An optimizer may
# instead say so itself with an attribute ``moment_names = {"first": (...), "second": (...)}``.
MOMENT_NAMES: dict[str, tuple[str, ...]] = {
    "first": ("exp_avg", "momentum_buffer", "exp_avg_diff"),
    "second": ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg"),
}


@dataclass(frozen=True)
class Slot:
    """Where the part of a parameter that this rank holds is kept.

    ``flat`` is the tensor under which the base optimizer files its state; the fragment is its
    elements [offset, offset + numel) and the parameter's elements [start, start + numel).
    """

    flat: Tensor
    offset: int
    start: int
    numel: int
    group: int  # index into the base optimizer's param_groups

    def view(self, tensor: Tensor) -> Tensor:
        """The fragment's elements of ``flat`` or of a state shaped like it, 1-D."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


class EngineState:
    """Fragments of all trainable parameters of an engine; see the module's docstring.

    Attributes:
        base: the optimizer that makes the update (torch's AdamW, ...), without wrappers.
        process_group: the data-parallel ranks that share the masters.
        tensor_group: the ranks that hold other parts of the same matrices (tensor parallelism).
        replicated: every rank holds every master entirely, each a tensor of its own (stage 0).
        device: where the engine computes; masters may live elsewhere (CPU offload).
    """

    def __init__(self, engine: Any) -> None:
        _refuse_unsupported(engine)
        optimizer = engine.optimizer
        self.engine = engine
        self.base: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.process_group: dist.ProcessGroup = engine.seq_data_parallel_group
        mpu = engine.mpu
        self.tensor_group = None if mpu is None else mpu.get_model_parallel_group()
        self.device = torch.device(engine.device)
        self.replicated = engine.zero_optimization_stage() == 0
        self._slots: dict[int, Slot | None] = {}
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        self._parameters: list[nn.Parameter] = []
        self._group_of: dict[int, int] = {}
        for parameter, group, slot in _slots(engine, self.base, self.process_group):
            self._parameters.append(parameter)
            self._group_of[id(parameter)] = group
            self._slots[id(parameter)] = slot
        self._shapes = {id(p): tuple(getattr(p, "ds_shape", p.shape)) for p in self._parameters}

    def all_groups(self) -> list[dist.ProcessGroup]:
        """Groups over which a sum or maximum reaches every rank that holds part of the model."""
        groups = [self.process_group]
        return groups if self.tensor_group is None else [*groups, self.tensor_group]

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts in a sum over tensor-parallel ranks: one if it is whole."""
        cut = shard_of(parameter) is not None
        return cut or self.tensor_group is None or dist.get_rank(self.tensor_group) == 0

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates, in the optimizer's order."""
        return list(self._parameters)

    def name(self, parameter: nn.Parameter) -> str:
        """Name within the engine's module."""
        return self._names[id(parameter)]

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Full shape; ZeRO-3 empties ``parameter.shape``."""
        return self._shapes[id(parameter)]

    def numel(self, parameter: nn.Parameter) -> int:
        """Number of elements of the whole parameter."""
        return torch.Size(self.shape(parameter)).numel()

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        """``(start, stop)`` of the flattened parameter that this rank holds; empty as (0, 0)."""
        slot = self.slot(parameter)
        return (slot.start, slot.start + slot.numel) if slot else (0, 0)

    def master(self, parameter: nn.Parameter) -> Tensor | None:
        """View of this rank's fragment of the master, 1-D; None if it holds nothing of it."""
        slot = self.slot(parameter)
        return slot.view(slot.flat) if slot else None

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Views of this rank's fragment of every per-element state; empty before the first update.

        Where a tensor of the optimizer is one parameter, states of other shapes (moments in a
        projected space) belong to it as well and are given whole.
        """
        slot = self.slot(parameter)
        if slot is None:
            return {}
        views = {}
        for name, value in self.base.state.get(slot.flat, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape == slot.flat.shape:
                views[name] = slot.view(value)
            elif self.replicated:
                views[name] = value.view(-1)
        return views

    def moment_names(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """Names of the states that are first and/or second moments for this optimizer."""
        table: Mapping[str, tuple[str, ...]] = getattr(self.base, "moment_names", MOMENT_NAMES)
        return tuple(name for kind in kinds for name in table.get(kind, ()))

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each of the optimizer's param groups, whole groups on every rank."""
        groups: list[list[nn.Parameter]] = [[] for _ in self.base.param_groups]
        for parameter in self._parameters:
            groups[self._group_of[id(parameter)]].append(parameter)
        return groups

    def entries(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The tensors of the base optimizer that hold some of ``parameters`` on this rank."""
        slots = (self.slot(parameter) for parameter in parameters)
        return list({id(slot.flat): slot.flat for slot in slots if slot}.values())

    def set_step_counters(self, parameters: Iterable[nn.Parameter], value: int) -> None:
        """Set the optimizer's step counter where this rank holds some of ``parameters``.

        Under ZeRO one counter serves all parameters of a group (one flat slice): the caller passes
        whole groups.
        """
        for flat in self.entries(parameters):
            state = self.base.state.get(flat, {})
            step = state.get("step")
            if isinstance(step, Tensor):
                step.fill_(value)
            elif step is not None:
                state["step"] = value

    def step_counters(self, parameters: Iterable[nn.Parameter]) -> list[int]:
        """Counters of the slices that hold ``parameters`` here; empty before the first update."""
        states = (self.base.state.get(flat, {}) for flat in self.entries(parameters))
        return [int(state["step"]) for state in states if "step" in state]

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the weights that the model computes with equal to the masters, on all ranks.

        Collective. Without it a written master has no effect until the next update.
        """
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:
            _refresh_stage3(optimizer)
        elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1, ZeRO-2, BF16_Optimizer
            optimizer.update_lp_params()
        elif optimizer is not self.base:  # stage 0 with masters beside the weights
            for parameter in self._parameters:
                master = self.master(parameter)
                if master is not None:
                    parameter.detach().view(-1).copy_(master)

    def relink(self) -> None:
        """Repair DeepSpeed's own access to states (``safe_get_full_optimizer_state``) at ZeRO-1/2.

        megalr does not need it (it reads the base optimizer), users and the universal checkpoint
        may. DeepSpeed links states once, after the step of the first param group, when the others
        have none yet, and drops the links in ``load_checkpoint`` while marking them as present.
        """
        optimizer = self.engine.optimizer
        ready = all(self.base.state.get(flat) for flat in self.entries(self._parameters))
        if hasattr(optimizer, "_hp_optimizer_states_linked") and ready:
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def slot(self, parameter: nn.Parameter) -> Slot | None:
        """Where this rank keeps its part of the parameter; None if it holds nothing of it."""
        return self._slots[id(parameter)]

    def flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Every tensor under which the base optimizer files state here, in the order of its
        ``state_dict``, with the parameters of which it holds parts on this or another rank."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:
            return list(
                zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
            )
        slots = [(parameter, self.slot(parameter)) for parameter in self._parameters]
        if self.replicated:
            return [(slot.flat, [parameter]) for parameter, slot in slots if slot]
        flats = [group["params"][0] for group in self.base.param_groups]
        return list(zip(flats, self.groups(), strict=True))


def _refuse_unsupported(engine: Any) -> None:
    optimizer = engine.optimizer
    if optimizer is None:
        raise UserError("restarts need an engine with an optimizer; this one has none")
    for attribute, key in (
        ("swap_optimizer", "zero_optimization.offload_optimizer.device nvme"),
        ("zenflow", "zero_optimization.zenflow"),
        ("round_robin_gradients", "zero_optimization.round_robin_gradients"),
    ):
        if getattr(optimizer, attribute, False):
            raise UserError(
                f"restarts cannot reach the optimizer state under {key}: "
                "turn it off (offload to cpu is supported) or turn restarts off"
            )
    if getattr(optimizer, "partial_offload", 1.0) != 1.0:
        raise UserError(
            "restarts need zero_optimization.offload_optimizer.ratio 1.0, "
            f"not {optimizer.partial_offload}"
        )


def _slots(
    engine: Any, base: torch.optim.Optimizer, process_group: dist.ProcessGroup
) -> Iterator[tuple[nn.Parameter, int, Slot | None]]:
    """Every trainable parameter with its param group and what this rank holds of it."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _stage3_slots(optimizer)
    elif hasattr(optimizer, "bf16_groups"):
        yield from _linked_slots(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _linked_slots(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    elif hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: one master a parameter
        for group, (weights, masters) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        ):
            for parameter, master in zip(weights, masters, strict=True):
                yield parameter, group, Slot(master, 0, 0, master.numel(), group)
    elif optimizer is base:
        for group, settings in enumerate(base.param_groups):
            for parameter in settings["params"]:
                yield parameter, group, Slot(parameter, 0, 0, parameter.numel(), group)
    else:
        raise UserError(
            f"restarts do not know the optimizer wrapper {type(optimizer).__name__} "
            f"of ZeRO stage {stage}"
        )


def _linked_slots(
    groups: list[list[nn.Parameter]], flats: list[Tensor]
) -> Iterator[tuple[nn.Parameter, int, Slot | None]]:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: DeepSpeed keeps each parameter's fragment addresses."""
    for group, (weights, flat) in enumerate(zip(groups, flats, strict=True)):
        for parameter in weights:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                yield parameter, group, None
                continue
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield parameter, group, Slot(flat, here.start, there.start, here.numel, group)


def _stage3_slots(optimizer: Any) -> Iterator[tuple[nn.Parameter, int, Slot | None]]:
    """ZeRO-3: each parameter is cut evenly, the last pieces padded; pieces lie end to end."""
    for sub_group, weights in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
        group = optimizer.sub_group_to_group_id[sub_group]
        offset = 0
        for parameter in weights:
            piece = parameter.partition_numel()
            start = piece * dist.get_rank(parameter.ds_process_group)
            numel = min(piece, parameter.ds_numel - start)
            slot = Slot(flat, offset, start, numel, group) if numel > 0 else None
            yield parameter, group, slot
            offset += piece


def _refresh_stage3(optimizer: Any) -> None:
    """What the engine's own step does after the base optimizer's, for all sub-groups."""
    optimizer._partition_all_parameters()
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()
