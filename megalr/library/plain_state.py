"""Masters and moments under a plain torch optimizer: on one process, under DDP, under FSDP2.

The parameters of the model are the masters. Under FSDP2 they are DTensors, of which a rank holds
some rows; the optimizer's state of a DTensor is either a DTensor too (torch's optimizers) or the
tensor of this rank's elements (megalr's).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megalr.errors import UserError
from megalr.layers.factors import FactorPair
from megalr.optim.sharded_optimizer import moment_names, set_step
from megalr.restarts.masters import Group
from megalr.sharding.dtensor import local_part, replica_groups, row_fragments
from megalr.sharding.fragment import Fragment, Ranks


class PlainState:
    """The interface :class:`megalr.restarts.masters.Masters` for a model and its optimizer.

    Args:
        model: the model, wrapped or not.
        optimizer: makes the updates.
        pairs: the factor pairs that refactorization works on.
        copies: the ranks that hold copies of an unsharded model and share the work on it; None:
            those of DDP if it wraps the model, else every rank works alone.

    Raises:
        UserError: factors that are sharded in several ways.
    """

    tensor_group: Group = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pairs: Sequence[FactorPair],
        copies: Group = None,
    ) -> None:
        self.base = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._factors = list({id(p): p for x in pairs for p in (x.b, x.a)}.values())
        shared = self._shared_ranks()
        self.replicated = shared is None
        self.process_group: Group
        if shared is not None:
            self.process_group = shared.group
        elif copies is None and isinstance(model, nn.parallel.DistributedDataParallel):
            self.process_group = model.process_group
        else:
            self.process_group = copies
        self.device = _device_of(self._factors or self.parameters())

    def _shared_ranks(self) -> Ranks | None:
        """The ranks over which the factors (without any: all parameters) are sharded."""
        parameters = self._factors or self.parameters()
        found = {_members(ranks): ranks for ranks in map(self._ranks, parameters)}
        if len(found) > 1 and self._factors:
            raise UserError(
                "restarts need factors that are all sharded over the same ranks, or none of them: "
                "use fully_shard with one mesh for the whole model"
            )
        return next(iter(found.values())) if any(found) else None

    def _ranks(self, parameter: nn.Parameter) -> Ranks:
        return row_fragments(parameter, self.name(parameter))[0]

    def all_groups(self) -> list[dist.ProcessGroup]:
        """The ranks of ``process_group``, and those that hold copies of this rank's shards."""
        replicas = replica_groups(self._factors[0]) if self._factors else []
        return [group for group in (self.process_group, *replicas) if group is not None]

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each of the optimizer's param groups."""
        return [list(group["params"]) for group in self.base.param_groups]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates, in its order."""
        return [parameter for group in self.groups() for parameter in group]

    def name(self, parameter: nn.Parameter) -> str:
        """Name within the model, or "parameter" for one that is not in it."""
        return self._names.get(id(parameter), "parameter")

    def fragments(self, parameter: nn.Parameter) -> tuple[Tensor, tuple[Fragment, ...]]:
        """This rank's elements of a parameter, and all ranks' fragments."""
        return local_part(parameter), row_fragments(parameter, self.name(parameter))[1]

    def master(self, parameter: nn.Parameter) -> Tensor | None:
        """View of this rank's elements, 1-D; None if it holds none."""
        local = local_part(parameter)
        return local.view(-1) if local.numel() else None

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's elements of the optimizer's states of a parameter, step counters aside."""
        state = self.base.state.get(parameter, {})
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return {name: local_part(value) for name, value in tensors.items() if value.dim() > 0}

    def counts(self, parameter: nn.Parameter) -> bool:
        """Always: there is no tensor parallelism here."""
        return True

    def moment_names(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """Names of the states that are first and/or second moments for this optimizer."""
        return moment_names(self.base, kinds)

    def entries(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The parameters themselves: they are the keys of the optimizer's state."""
        return list(parameters)

    def set_step_counters(self, parameters: Iterable[nn.Parameter], value: int) -> None:
        """Set the step counters of ``parameters`` where the optimizer has them."""
        for parameter in parameters:
            set_step(self.base.state.get(parameter, {}), value)

    def refresh_weights(self) -> None:
        """Give all copies of a shard (hybrid sharding) the bits of the first one. Collective."""
        for parameter in self._factors:
            for group in replica_groups(parameter):
                local = local_part(parameter)
                moved = local.to(self.device)
                dist.broadcast(moved, dist.get_global_rank(group, 0), group=group)
                local.copy_(moved)

    def relink(self) -> None:
        """Nothing: torch's optimizers have one access to their states."""


def _members(ranks: Ranks) -> tuple[int, ...]:
    """Global ranks of a group; none for a tensor that is whole on this rank."""
    return () if ranks.group is None else tuple(dist.get_process_group_ranks(ranks.group))


def _device_of(parameters: Sequence[nn.Parameter]) -> torch.device:
    """Where the model computes; shards may be offloaded to the CPU."""
    first = parameters[0]
    kind = first.device_mesh.device_type if isinstance(first, DTensor) else first.device.type
    if kind == "cuda" and first.device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return first.device
