"""Base of all optimizers: logical tensors, state handling, momentum reset.

Design, and how it lives under ZeRO
-----------------------------------
1. An update rule works on logical tensors (:mod:`megalr.sharding.fragment`), not on parameters.
2. On plain PyTorch parameters the layout is trivial. Once the engine is built, ``megalr.engine``
   calls ``attach_layouts`` with a description of ZeRO's flat fp32 slices.
3. So ZeRO keeps its jobs: it reduces, accumulates, averages and clips gradients, holds the fp32
   masters, gathers the new weights, offloads and writes checkpoints. Nothing of it is replaced.
4. Elementwise rules run on the slices; the few scalars per tensor that they need are completed by
   one small all-reduce each.
5. Matrix rules need whole matrices. A matrix that lies inside one slice is updated in place. One
   that a slice boundary cuts is owned by one of its holders: its gradient pieces go there, the
   finished update comes back, both by all_to_all over bounded buckets. Under ZeRO 1 and 2 that
   concerns at most one matrix per boundary, under ZeRO 3 every matrix.
6. Projector and moments of a matrix exist on its owner only. The new master is
   ``W - step_size * U`` elementwise, wherever its elements lie, so the result does not depend on
   the number of ranks.
   Under tensor parallelism all this concerns a rank's parts of matrices. The owners of the parts
   of a matrix make it whole among themselves (:mod:`megalr.sharding.workers`).
7. All state is tensors and plain numbers in plain dicts: readable with ``weights_only=True``.
8. ZeRO 1 and 2 call ``step`` once per parameter group and show one group at a time, ZeRO 3 once
   per sub-group: every counter therefore lives in the state of its flat storage.
9. Without an engine, FSDP2 splits parameters by rows (DTensors). The layout then has one flat
   tensor for each parameter, this rank's rows, and the rules are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from megalr.config.base import Section
from megalr.errors import UserError
from megalr.optim.options import check_options, with_defaults
from megalr.sharding.dtensor import local_part, local_shard, parameter_layout
from megalr.sharding.exchange import MatrixUpdate, update_matrices
from megalr.sharding.fragment import FlatLayout, LogicalTensor, Ranks

OWN = "rank"
"""Key of a saved state that belongs to one rank: its rank and the number of ranks."""
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
MOMENT_NAMES: dict[str, tuple[str, ...]] = {
    "first": ("exp_avg", "momentum_buffer", "exp_avg_diff"),
    "second": ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg"),
}
"""Names of per-element states, over the optimizers of torch, DeepSpeed and megalr."""


def moment_names(optimizer: torch.optim.Optimizer, kinds: Iterable[str]) -> tuple[str, ...]:
    """Names of the states that are first and/or second moments for an optimizer.

    An optimizer may say so itself with an attribute ``moment_names = {"first": (...), ...}``.
    """
    table: Mapping[str, tuple[str, ...]] = getattr(optimizer, "moment_names", MOMENT_NAMES)
    return tuple(name for kind in kinds for name in table.get(kind, ()))


def set_step(state: dict[str, Any], value: int) -> None:
    """Set the step counter in an optimizer's state of one tensor, if it has one."""
    step = state.get("step")
    if isinstance(step, torch.Tensor):
        step.fill_(value)
    elif step is not None:
        state["step"] = value


def scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-tensor statistics: never below fp32 (bf16 averages of scalars stall)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat_part(parameter: torch.Tensor) -> torch.Tensor:
    """View of this rank's elements of a parameter, 1-D."""
    return local_part(parameter).view(-1)


def flat_grad(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a parameter's gradient, 1-D."""
    assert parameter.grad is not None  # _entries
    return local_part(parameter.grad).reshape(-1)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, DTensor):
        return local_part(value).to(device, copy=True).view(-1)
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: a torch optimizer whose rules work on logical tensors.

    Options are keyword arguments, or keys of a parameter group; ``declared`` names the sections of
    the configuration that give their meaning, default and limits. ``state_dtype`` (None: fp32, or
    fp64 for fp64 parameters) is the dtype of the moments; ``seed`` starts the random numbers of
    rules that draw any.
    """

    declared: ClassVar[tuple[type[Section], ...]]
    """Sections of the configuration that declare the options."""
    marks: ClassVar[dict[str, Any]] = {}
    """Options beyond those of the sections, or with another default: those that differ between the
    groups of a run or follow from it."""
    apart: ClassVar[tuple[str, ...]] = ()
    """Kinds of parameters (optim.groups) that need groups of their own in a run."""
    matrix_elements: ClassVar[tuple[str, ...]] = ()
    """States of whole matrices (``matrices``) with one number for each element of the matrix. Under
    tensor parallelism a rank has those of its part; other states are the same on all its peers."""
    per_tensor_states: ClassVar[tuple[str, ...]] = ()
    """States with one number for each logical tensor of a flat storage, in the layout's order."""

    def __init__(
        self,
        params: ParamsT,
        *,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.state_dtype, self.seed = state_dtype, seed
        self._layouts: dict[torch.Tensor, FlatLayout] = {}
        super().__init__(params, with_defaults(self.declared, self.marks, options))

    # -- groups and layouts -----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its options are checked and its tensors get their numbers."""
        super().add_param_group(param_group)
        self._lay_out()
        self._check_group(self.param_groups[-1])

    def _lay_out(self) -> None:
        """Describe the parameters as they are: whole on this rank, or DTensors that are split."""
        self._layouts, number = {}, 1
        loads: dict[int, list[float]] = {}
        for group in self.param_groups:
            names = group.get("param_names")  # of ``Optimizer(model.named_parameters())``
            for index, parameter in enumerate(group["params"]):
                name = f"tensor{number}" if names is None else names[index]
                if not local_part(parameter).is_contiguous():
                    raise UserError(
                        f"{name} of shape {tuple(parameter.shape)} is not contiguous in memory: "
                        "replace the parameter by a contiguous one"
                    )
                layout = parameter_layout(parameter, name, number, loads)
                self._layouts[parameter] = layout
                number += len(layout.tensors)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise UserError for options out of range or without a meaning for the group's tensors."""
        check_options(self.declared, group)

    def attach_layouts(self, layouts: Mapping[torch.Tensor, FlatLayout]) -> None:
        """Set the layouts of the flat tensors that replace the parameters in ``param_groups``."""
        self._layouts = dict(layouts)

    def layout(self, parameter: torch.Tensor) -> FlatLayout:
        """The layout of one tensor of ``param_groups``."""
        return self._layouts[parameter]

    def logical_tensors(self) -> dict[str, tuple[torch.Tensor, LogicalTensor]]:
        """The logical tensors by name, each with its entry, whatever ``param_groups`` show now."""
        layouts = self._layouts.items()
        return {tensor.name: (key, tensor) for key, layout in layouts for tensor in layout.tensors}

    def _moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.state_dtype or scalar_dtype(parameter.dtype)

    # -- step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups()
        return loss

    def _entries(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """(group, entry) of everything in ``param_groups`` that has a gradient.

        The engine's bf16 wrapper without ZeRO makes a step with zero gradients while it is built,
        to create state; here it would count as an update, so nothing is yielded then.
        """
        found = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if any(p not in self._layouts and isinstance(p, DTensor) for _, p in found):
            self._lay_out()  # accelerate shards the model and puts the shards into param_groups
        unknown = [parameter for _, parameter in found if parameter not in self._layouts]
        if not unknown:
            yield from found
        elif any(bool(parameter.grad.any()) for parameter in unknown):
            raise RuntimeError(
                "the optimizer was given tensors that it has no layout for: call "
                "attach_layouts once the engine is built"
            )

    def _step_groups(self) -> None:
        pending = []
        for group, parameter in self._entries():
            update = self._update(parameter, flat_part(parameter), flat_grad(parameter), group)
            if update is not None:
                pending.append(update)
        update_matrices(pending)

    def _update(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> MatrixUpdate | None:
        """Update the flat storage of one entry of ``param_groups`` in place.

        What whole matrices need is returned, and done with that of all entries.
        """
        raise NotImplementedError

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, readable with ``weights_only=True``.

        Under FSDP2 a state with the elements of a parameter is a DTensor like it; states of whole
        matrices are those that this rank owns, marked with its rank.
        """
        saved = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in saved["state"].items():
            parameter = parameters[index]
            if isinstance(parameter, DTensor):
                ranks = self.layout(parameter).ranks
                saved["state"][index] = self._shared_state(state, parameter, ranks)
        return saved

    def _shared_state(
        self, state: dict[str, Any], parameter: DTensor, ranks: Ranks
    ) -> dict[str, Any]:
        """The state of a DTensor as several ranks may save it together."""
        shared: dict[str, Any] = {}
        numel = local_part(parameter).numel()
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or key in self.per_tensor_states:
                own = isinstance(value, dict)
            else:
                own = value.numel() != numel
                value = value if own else local_shard(value, parameter)
            shared[key] = value
            if own and ranks.size > 1:
                shared[OWN] = [ranks.rank, ranks.size]
        return shared

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Unlike torch's own, it keeps every state's dtype.

        Raises:
            UserError: states of another rank or number of ranks (FSDP2, whole matrices).
        """
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        saved = [index for group in groups for index in group["params"]]
        current = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(saved, current, strict=True):
            if index in state_dict["state"]:
                state = dict(state_dict["state"][index])
                self._check_rank(state.pop(OWN, None), parameter)
                self.state[parameter] = _to_device(state, parameter.device)

    def _check_rank(self, saved: list[int] | None, parameter: torch.Tensor) -> None:
        ranks = self.layout(parameter).ranks
        if saved is not None and saved != [ranks.rank, ranks.size]:
            raise UserError(
                f"states of rank {saved[0]} of {saved[1]} cannot be loaded on rank {ranks.rank} of "
                f"{ranks.size}: states of whole matrices are not shared, so every rank must save "
                "its state_dict() in a file of its own, and as many ranks load them"
            )

    def tensor_states(self, parameter: torch.Tensor) -> Iterable[tuple[str, dict[str, Any]]]:
        """(name, state) of the whole-matrix states that this rank keeps for one entry."""
        return self.state[parameter].get("matrices", {}).items()

    @torch.no_grad()
    def reset_moments(
        self,
        parameters: Iterable[torch.Tensor] | None = None,
        moments: Iterable[str] = MOMENTS,
        counter: str = "keep",
    ) -> tuple[int, int]:
        """Zero moments on this rank; returns (elements zeroed, elements of moments held here).

        ``parameters`` are entries of ``param_groups`` (None: all that have state); ``moments`` a
        choice of ``exp_avg``, ``exp_avg_sq`` and Muon's ``momentum_buffer``; ``counter`` keep,
        zero or one: what happens to the bias-correction counter; with zero and one the limiter of
        Fira and APOLLO restarts too. Entries before their first update have nothing to zero.
        """
        if counter not in ("keep", "zero", "one"):
            raise UserError(f"counter must be keep, zero or one, got {counter!r}")
        chosen = None if parameters is None else {id(p) for p in parameters}
        kinds, zeroed, held = set(moments), 0, 0
        for parameter, state in self.state.items():
            stores = [state, *state.get("matrices", {}).values()]
            tensors = [(key, s[key]) for s in stores for key in MOMENTS if key in s]
            held += sum(tensor.numel() for _, tensor in tensors)
            if chosen is not None and id(parameter) not in chosen:
                continue
            for key, tensor in tensors:
                if key in kinds:
                    tensor.zero_()
                    zeroed += tensor.numel()
            if counter != "keep" and "step" in state:
                state["step"] = 0 if counter == "zero" else 1
                # The limiter's norm is one of N without bias correction, and N of a young counter
                # is several times larger: held to the old norm, updates would be too small.
                for own in state.get("matrices", {}).values():
                    own.pop("update_norm", None)
        return zeroed, held


def require_matrix(tensor: LogicalTensor, rank: int) -> None:
    """Refuse a tensor that cannot be projected to ``rank``."""
    if len(tensor.shape) != 2:
        raise UserError(
            f"{tensor.name} of shape {tensor.shape} is no matrix: a group with a rank holds "
            "2-D tensors only"
        )
    if not 1 <= rank <= min(tensor.shape):
        raise UserError(
            f"rank {rank} is out of range for {tensor.name} of shape {tensor.shape}: "
            f"choose 1 to {min(tensor.shape)}"
        )
