"""Parameter groups of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, factors: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in up to three groups, in the order of the model.

    * ``factors``: the factors of factorized matrices. They have a group of their own because
      ZeRO keeps one Adam step counter per group, and a momentum reset may restart theirs alone.
    * ``matrices``: every other parameter of two dimensions, and the sparse values of SLTrain.
    * ``vectors``: norms and biases, without weight decay.
    """
    factor_ids = {id(parameter) for parameter in factors}
    chosen: dict[str, list[nn.Parameter]] = {"factors": [], "matrices": [], "vectors": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in factor_ids:
            chosen["factors"].append(parameter)
        else:
            matrix = parameter.dim() > 1 or hasattr(parameter, "row_blocks")
            chosen["matrices" if matrix else "vectors"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, parameters in chosen.items()
        if parameters
    ]
