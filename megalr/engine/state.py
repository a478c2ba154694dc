"""Masters and optimizer states of the parameters inside an engine, as fragments.

A rank's fragment of a parameter is a range of the flattened parameter, as 1-D views of the fp32
master (bf16 with ``paper_bf16``), which is the truth, and of every per-element optimizer state.
Under ZeRO fragments of different ranks do not overlap; at stage 0 every rank holds everything.

Optimizer states are read from the base optimizer at every call, never cached: they do not exist
before the first update, and loading a checkpoint replaces their tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.engine.wrappers import wrapper_of
from megalr.errors import UserError
from megalr.kernels.adamw import AdamW
from megalr.optim.loro import LORO
from megalr.optim.matrix import MatrixOptimizer
from megalr.optim.muon import Muon
from megalr.optim.scale import SCALE
from megalr.optim.sharded_optimizer import ShardedOptimizer, moment_names, set_step
from megalr.optim.spam import SPAM
from megalr.optim.spectron import Spectron
from megalr.optim.stable_spam import StableSPAM
from megalr.sharding.fragment import Fragment
from megalr.sharding.tensor_shard import shard_of

WHOLE_MATRIX = (MatrixOptimizer, LORO, Muon, Spectron)
"""Optimizers whose work on whole matrices ZeRO's ranks share."""
CUT_BY_TENSOR_RANKS = (MatrixOptimizer, LORO, StableSPAM, SCALE)
"""Optimizers that look at whole tensors and cannot put tensor-parallel parts together."""


class EngineState:
    """Fragments of all trained parameters of an engine; see the module's docstring.

    Raises UserError where masters or states cannot be reached (NVMe offload, ...).

    Attributes:
        wrapper: the adapter of the engine's optimizer.
        base: the optimizer that makes the update (torch's AdamW, ...), without wrappers.
        process_group: the data-parallel ranks that share the masters.
        tensor_group: the ranks that hold other parts of the same matrices (tensor parallelism).
        replicated: every rank holds every master entirely, each a tensor of its own (stage 0).
        device: where the engine computes; masters may live elsewhere (CPU offload).
    """

    def __init__(self, engine: Any) -> None:
        self.wrapper = wrapper_of(engine)
        self.wrapper.check_reachable()
        self.base = self.wrapper.base
        self.process_group: dist.ProcessGroup = engine.seq_data_parallel_group
        mpu = engine.mpu
        self.tensor_group = None if mpu is None else mpu.get_model_parallel_group()
        self.device = torch.device(engine.device)
        self.replicated = self.wrapper.replicated

    def all_groups(self) -> list[dist.ProcessGroup]:
        """Groups over which a sum or maximum reaches every rank that holds part of the model."""
        groups = [self.process_group]
        return groups if self.tensor_group is None else [*groups, self.tensor_group]

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts in a sum over tensor-parallel ranks: one if it is whole."""
        sharded = shard_of(parameter) is not None
        return sharded or self.tensor_group is None or dist.get_rank(self.tensor_group) == 0

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates, in the optimizer's order."""
        return [p for storage in self.wrapper.storages for p, _ in storage.parameters]

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each of the optimizer's param groups, whole groups on every rank."""
        return self.wrapper.groups()

    def name(self, parameter: nn.Parameter) -> str:
        """Name within the engine's module."""
        return self.wrapper.name(parameter)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Full shape (of the tensor-parallel part)."""
        return self.wrapper.shape(parameter)

    def numel(self, parameter: nn.Parameter) -> int:
        """Number of elements of the whole parameter."""
        return torch.Size(self.shape(parameter)).numel()

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        """``(start, stop)`` of the flattened parameter that this rank holds; empty as (0, 0)."""
        located = self.wrapper.fragment(parameter)
        return (located[1].start, located[1].stop) if located else (0, 0)

    def fragments(self, parameter: nn.Parameter) -> tuple[Tensor, tuple[Fragment, ...]]:
        """The tensor that holds a parameter's master on this rank, and all ranks' fragments."""
        return self.wrapper.fragments(parameter)

    def master(self, parameter: nn.Parameter) -> Tensor | None:
        """View of this rank's fragment of the master, 1-D; None if it holds nothing of it."""
        located = self.wrapper.fragment(parameter)
        return located[1].of(located[0].detach().view(-1)) if located else None

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Views of this rank's fragment of every per-element state; empty before the first update.

        Where a tensor of the optimizer is one parameter, states of other shapes (moments in a
        projected space) belong to it as well and are given whole.
        """
        located = self.wrapper.fragment(parameter)
        if located is None:
            return {}
        flat, fragment = located
        views = {}
        for name, value in self.base.state.get(flat, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape == flat.shape:
                views[name] = fragment.of(value.detach().view(-1))
            elif self.replicated:
                views[name] = value.view(-1)
        return views

    def moment_names(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """Names of the states that are first and/or second moments for this optimizer."""
        return moment_names(self.base, kinds)

    def entries(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The tensors of the base optimizer that hold some of ``parameters`` on this rank."""
        located = (self.wrapper.fragment(parameter) for parameter in parameters)
        return list({id(found[0]): found[0] for found in located if found}.values())

    def set_step_counters(self, parameters: Iterable[nn.Parameter], value: int) -> None:
        """Set the optimizer's step counter where this rank holds some of ``parameters``.

        Under ZeRO one counter serves all parameters of a group (one flat slice): the caller passes
        whole groups.
        """
        for flat in self.entries(parameters):
            set_step(self.base.state.get(flat, {}), value)

    def step_counters(self, parameters: Iterable[nn.Parameter]) -> list[int]:
        """Counters of the slices that hold ``parameters`` here; empty before the first update."""
        states = (self.base.state.get(flat, {}) for flat in self.entries(parameters))
        return [int(state["step"]) for state in states if "step" in state]

    def refresh_weights(self) -> None:
        """Make the weights that the model computes with equal to the masters, on all ranks.

        Collective. Without it a written master has no effect until the next update.
        """
        self.wrapper.refresh_weights()

    def relink(self) -> None:
        """Repair the getters of optimizer states that DeepSpeed offers its users."""
        self.wrapper.relink()


def attach_layouts(engine: Any) -> None:
    """Hand the layouts of the engine's flat tensors to its optimizer, right after initialize.

    An AdamW that rounds stochastically gets the numbers of the elements instead. Nothing is done
    for optimizers that need neither.

    Raises:
        UserError: as :func:`check_ranks`.
    """
    wrapper = wrapper_of(engine)
    base = wrapper.base
    if isinstance(base, AdamW) and base.rounding is not None:
        base.attach_runs(wrapper.runs)
    if not isinstance(base, ShardedOptimizer):
        return
    ranks = dist.get_world_size(engine.data_parallel_group) if dist.is_initialized() else 1
    mpu = getattr(engine, "mpu", None)
    size = 1 if mpu is None else mpu.get_model_parallel_world_size()
    check_ranks(base, wrapper.replicated, ranks, size)
    base.attach_layouts(wrapper.layouts)


def check_ranks(base: torch.optim.Optimizer, replicated: bool, ranks: int, size: int) -> None:
    """Check that an optimizer sees what it looks at.

    Args:
        base: the optimizer.
        replicated: whether every data-parallel rank holds all masters (stage 0).
        ranks: data-parallel ranks.
        size: tensor-parallel ranks. Each holds a part of a matrix: its SVD, norm or maximum are
            not those of the matrix. Muon and Spectron put the parts together.

    Raises:
        UserError: a whole-matrix optimizer at stage 0 on several ranks (every rank would keep all
            states and repeat every decomposition, and ranks whose results differ in the last digit
            would drift apart unnoticed), or one that looks at whole tensors under tensor
            parallelism.
    """
    if replicated and ranks > 1 and isinstance(base, WHOLE_MATRIX):
        raise UserError(
            f"{type(base).__name__} works on whole matrices and shares them out over the ranks "
            "through ZeRO: zero_optimization.stage is 0 with several ranks, use stage 1 or more"
        )
    masked = isinstance(base, SPAM) and any(
        g["density"] not in (None, 1) for g in base.param_groups
    )
    if size > 1 and (masked or isinstance(base, CUT_BY_TENSOR_RANKS)):
        raise UserError(
            f"{type(base).__name__} looks at whole tensors and tensor parallelism over {size} "
            "ranks cuts them: use data parallelism for it, or adamw, spam (density 1), muon, "
            "normuon or spectron"
        )
