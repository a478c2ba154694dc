"""Matrices that read one input and differ in rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megalr.layers.factors import FactorPair, LinearShape
from megalr.layers.linear import FactorizedLinear, GroupedLinear

MakeFactorized = Callable[[LinearShape, int], FactorizedLinear]
"""Builds the layer of the matrices of one rank, ``(shape, rank)``, without biases."""


class MixedRankLinear(GroupedLinear):
    """The matrices of one group, those of equal rank in one factorized layer each.

    ``y_i`` is what the layer of matrix i computes from the common input, plus ``bias_i``. The
    factors B of one layer are one parameter and have one width, hence a layer for each rank.

    Args:
        shape: sizes of the group.
        ranks: r_i of each matrix, not all equal.
        make: builds the layer of some of the matrices.
        bias: adds a vector to each output; the stack belongs to this module.

    Attributes:
        parts: the layers, in the order in which their ranks first occur.
    """

    def __init__(
        self, shape: LinearShape, ranks: Sequence[int], make: MakeFactorized, bias: bool = False
    ) -> None:
        super().__init__(shape, bias)
        members: dict[int, list[int]] = {}
        for index, rank in enumerate(ranks):
            members.setdefault(rank, []).append(index)
        self.members = tuple(tuple(indices) for indices in members.values())
        self.parts = nn.ModuleList(
            make(shape.subset(indices), rank) for rank, indices in members.items()
        )

    def layer_of(self, index: int) -> tuple[GroupedLinear, int]:
        """The layer that stores matrix ``index``, and its index in there."""
        for indices, part in zip(self.members, self.parts, strict=True):
            if index in indices and isinstance(part, GroupedLinear):
                return part, indices.index(index)
        raise IndexError(index)

    def forward(self, x: Any) -> tuple[torch.Tensor, ...]:
        """``x (..., n)``, as for the parts, to the outputs ``(..., m_i)`` in the group's order."""
        outputs: dict[int, torch.Tensor] = {}
        for indices, part in zip(self.members, self.parts, strict=True):
            outputs |= zip(indices, part(x), strict=True)
        found = [outputs[index] for index in range(len(self.sizes))]
        if self.bias is None:
            return tuple(found)
        biases = self.bias.split(self.sizes)
        return tuple(y + bias for y, bias in zip(found, biases, strict=True))

    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw the weights of all parts; a matrix's draw depends on its name and rank only."""
        for layer in self._layers():
            layer.reset_parameters(seed, std)

    def dense_weight(self, index: int) -> torch.Tensor:
        """As the layer that stores it."""
        layer, place = self.layer_of(index)
        return layer.dense_weight(place)

    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """As the layer that stores it."""
        layer, place = self.layer_of(index)
        layer.load_dense(place, weight)

    def stored_matrix(self, index: int) -> dict[str, torch.Tensor]:
        """As the layer that stores it."""
        layer, place = self.layer_of(index)
        return layer.stored_matrix(place)

    def weight_count(self) -> int:
        """The sum over the parts."""
        return sum(layer.weight_count() for layer in self._layers())

    def frozen_weight_count(self) -> int:
        """The sum over the parts."""
        return sum(layer.frozen_weight_count() for layer in self._layers())

    def factor_pairs(self) -> list[FactorPair]:
        """The pairs of all parts, in the group's order."""
        pairs = {pair.name: pair for layer in self._layers() for pair in layer.factor_pairs()}
        return [pairs[name] for name in self.shape.names if name in pairs]

    def _layers(self) -> list[GroupedLinear]:
        return [part for part in self.parts if isinstance(part, GroupedLinear)]
