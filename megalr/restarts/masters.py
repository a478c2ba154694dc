"""What refactorization and momentum reset need to know of masters and moments.

Two classes have this interface: ``EngineState`` (``megalr/engine/state.py``) for runs of
``pretrain.py``, and ``PlainState`` (``megalr/library/plain_state.py``) for plain torch optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.sharding.fragment import Fragment

Group = dist.ProcessGroup | None


class Masters(Protocol):
    """Masters and moments of the trained parameters, as fragments of this rank."""

    @property
    def base(self) -> torch.optim.Optimizer:
        """The optimizer that makes the update."""

    @property
    def process_group(self) -> Group:
        """The ranks that share the masters, or that hold copies of them; None: this one."""

    @property
    def tensor_group(self) -> Group:
        """The ranks that hold other parts of the same matrices (tensor parallelism)."""

    @property
    def device(self) -> torch.device:
        """Where the model computes; masters may lie elsewhere (CPU offload)."""

    @property
    def replicated(self) -> bool:
        """Every rank holds every master entirely, each a tensor of its own."""

    def all_groups(self) -> Sequence[dist.ProcessGroup]:
        """Groups over which a sum or maximum reaches every rank that holds part of the model."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates, in the optimizer's order."""

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each of the optimizer's param groups."""

    def name(self, parameter: nn.Parameter) -> str:
        """Name within the model."""

    def fragments(self, parameter: nn.Parameter) -> tuple[Tensor, tuple[Fragment, ...]]:
        """The tensor that holds a parameter's master on this rank, and all ranks' fragments."""

    def master(self, parameter: nn.Parameter) -> Tensor | None:
        """View of this rank's elements of the master, 1-D; None if it holds none."""

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's elements of every state with elements; empty before the first update."""

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts in a sum over tensor-parallel ranks."""

    def moment_names(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """Names of the states that are first and/or second moments for this optimizer."""

    def entries(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The keys of the optimizer's state under which ``parameters`` have something here."""

    def set_step_counters(self, parameters: Iterable[nn.Parameter], value: int) -> None:
        """Set the optimizer's step counters of ``parameters``."""

    def refresh_weights(self) -> None:
        """Make the weights that the model computes with equal to the masters. Collective."""

    def relink(self) -> None:
        """Repair other accesses to optimizer states after these were written."""
