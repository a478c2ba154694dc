"""The factor pairs of a model: layers of megalr, and of a folder exported in factorized form.

An exported folder (``megalr export --form factorized``) runs its own copy of
``modeling_factorized.py``, so its layers are recognised by their names and not by their classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megalr.layers.factors import FactorPair
from megalr.layers.linear import GroupedLinear

EXPORTED = "modeling_factorized"
"""Last part of the module that exported layers come from."""


def factor_pairs(model: nn.Module) -> list[FactorPair]:
    """All pairs B, A with ``W = scale B A (+ ...)``, in the order of the model.

    Layers with a nonlinearity between the factors have none.
    """
    pairs: list[FactorPair] = []
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            pairs += module.factor_pairs()
        else:
            pairs += _exported_pairs(name, module)
    return pairs


def trained_pairs(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[FactorPair]:
    """The pairs of which an optimizer has both factors."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [pair for pair in factor_pairs(model) if id(pair.a) in held and id(pair.b) in held]


def _exported_pairs(name: str, module: Any) -> Iterator[FactorPair]:
    """Pairs of a ``Projection``, or of the ``SharedProjection``s whose A this parent holds."""
    if _is_exported(module, "Projection") and not module.silu:
        blocks: list[Any] = list(module.b) if isinstance(module.b, nn.ModuleList) else [module.b]
        rank = blocks[0].in_features
        for i, block in enumerate(blocks):
            part = f".{i}" if len(blocks) > 1 else ""
            yield _pair(name + part, block.weight, module.a.weight, i * rank, rank)
    children: list[tuple[str, Any]] = list(module.named_children())
    for leaf, child in children:
        if _is_exported(child, "SharedProjection") and not child.silu:
            a, rank = module.shared_a.weight, child.stop - child.start
            yield _pair(f"{name}.{leaf}", child.b.weight, a, child.start, rank)


def _is_exported(module: nn.Module, kind: str) -> bool:
    own = type(module)
    return own.__name__ == kind and own.__module__.rpartition(".")[2] == EXPORTED


def _pair(name: str, b: nn.Parameter, a: nn.Parameter, first: int, rank: int) -> FactorPair:
    """The product of all of B and some rows of A; its scale is in B."""
    return FactorPair(name, b, (0, b.shape[0]), a, (first, first + rank), 1.0, a.shape[1])
