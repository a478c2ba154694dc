"""Momentum reset: the chosen moments of the chosen parameters become zero in place.

Nothing is gathered: every rank zeroes its fragments and restarts the step counter of their param
group. The zeroed elements are counted and summed over ranks, because a reset that touches nothing
and does not say so is the classic failure (arXiv 2505.22922 resets every 200 updates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megalr.errors import UserError
from megalr.optim.groups import OUTER_PARTS
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.restarts.masters import Masters
from megalr.restarts.refactorize import sum_over

Counter = Literal["zero", "one", "keep"]
Scope = Literal["all", "layers", "factors"]


@dataclass(frozen=True)
class Reset:
    """Counts of a reset, summed over ranks.

    At stage 0 each counts its own copy, and so does each tensor-parallel rank for what it holds
    whole, with the optimizers of :mod:`megalr.optim`.
    """

    elements: int  # moment elements that were zeroed
    total: int  # moment elements that exist; 0 before the first update
    parameters: tuple[str, ...]  # names of the parameters that were to be reset

    @property
    def fraction(self) -> float:
        """Share of the existing moment elements that was zeroed; 0 when none exist."""
        return self.elements / self.total if self.total else 0.0


def parameters_in_scope(
    state: Masters, scope: Scope, factors: Sequence[nn.Parameter]
) -> Sequence[nn.Parameter]:
    """Of a decoder's parameters those that ``restarts.reset_scope`` names."""
    if scope == "factors":
        return factors
    every = state.parameters()
    if scope == "all":
        return every
    return [p for p in every if state.name(p).partition(".")[0] not in OUTER_PARTS]


def check_groups(
    state: Masters, parameters: Sequence[nn.Parameter], counter: Counter, scope: Scope
) -> None:
    """Raise UserError if ``parameters`` cannot be reset without the rest of their param groups.

    Under ZeRO a group has one step counter; optimizers of :mod:`megalr.optim` keep whole-matrix
    states beside the flat ones and reset whole groups only.
    """
    if state.replicated:
        return
    if counter == "keep" and not isinstance(state.base, ShardedOptimizer):
        return
    chosen = {id(p) for p in parameters}
    for index, group in enumerate(state.groups()):
        inside = sum(id(p) in chosen for p in group)
        if 0 < inside < len(group):
            raise UserError(
                f"restarts.reset_scope = {scope} with reset_counter = {counter}: under ZeRO whole "
                f"parameter groups are reset, but group {index} has {inside} of them among "
                f"{len(group)} parameters; put them into a group of their own"
            )


@torch.no_grad()
def reset_moments(
    state: Masters,
    parameters: Sequence[nn.Parameter],
    kinds: Sequence[str] = ("first", "second"),
    counter: Counter = "zero",
) -> Reset:
    """Zero the moments of the given kinds of ``parameters`` and restart their counters.

    Before the first update there are no moments: nothing happens and ``total`` is 0 on all ranks.
    Collective (one sum). Raises RuntimeError if moments exist but none was zeroed.
    """
    names = state.moment_names(kinds)
    if isinstance(state.base, ShardedOptimizer):
        entries = state.entries(parameters)
        counts = state.base.reset_moments(entries, names, counter)
    else:
        counts = _zero_fragments(state, parameters, names)
        if counter != "keep":
            state.set_step_counters(parameters, 1 if counter == "one" else 0)
    state.relink()  # so that the engine's own getters read the same moments
    elements, total = sum_over(counts, state, over_tensor_ranks=True)
    if total and parameters and not elements:
        raise RuntimeError(
            f"the momentum reset found no {' or '.join(kinds)} moments of "
            f"{len(parameters)} parameters in {type(state.base).__name__}"
        )
    return Reset(elements, total, tuple(state.name(p) for p in parameters))


def _zero_fragments(
    state: Masters, parameters: Sequence[nn.Parameter], names: Sequence[str]
) -> tuple[int, int]:
    """Zero the named states of ``parameters`` here; elements zeroed and elements of moments."""
    chosen = {id(p) for p in parameters}
    every = state.moment_names(("first", "second"))
    zeroed = total = 0
    for parameter in state.parameters():
        moments = state.states(parameter)
        counted = state.counts(parameter)
        total += counted * sum(moments[name].numel() for name in every if name in moments)
        if id(parameter) not in chosen:
            continue
        for name in names:
            if name in moments:
                moments[name].zero_()
                zeroed += counted * moments[name].numel()
    return zeroed, total
