"""Parameter groups of the optimizer: learning rate and weight decay by kind of parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from megalr.config.optimizers import LearningRateRatios, WeightDecayRatios
from megalr.errors import UserError

NAME_OF_KIND = {
    "factors": "factors",
    "matrices": "matrices",
    "embedding": "matrices",
    "head": "matrices",
    "sparse": "matrices",
    "norms": "vectors",
}
"""The group of each kind when all ratios are those by default."""

OUTER_PARTS = {"embedding": "embedding", "positions": "embedding", "head": "head"}
"""Kinds of the parts of a decoder that are outside of its layers; the rest is layers and norms."""


def parameter_groups(
    model: nn.Module,
    factors: Iterable[nn.Parameter],
    weight_decay: float,
    lr_ratio: LearningRateRatios | None = None,
    weight_decay_ratio: WeightDecayRatios | None = None,
    apart: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Trainable parameters in groups, in the order of the model inside each.

    * ``factors``: the factors of factorized matrices. They have a group of their own because
      ZeRO keeps one Adam step counter per group, and a momentum reset may restart theirs alone.
    * ``matrices``: every other parameter of two dimensions, and the sparse values of SLTrain.
    * ``vectors``: norms and biases, by default without weight decay.

    Of these, kinds whose learning rate or weight decay differs from that of the group's first kind
    (see ``NAME_OF_KIND``), and those of ``apart``, get a group named after the kind. ``lr_ratio``
    of a group, if not 1, is the factor of its learning rate.

    Raises:
        UserError: a ratio for a kind that the model has no parameters of.
    """
    lr_ratio, decay_ratio = lr_ratio or LearningRateRatios(), weight_decay_ratio
    decay_ratio = decay_ratio or WeightDecayRatios()
    factor_ids = {id(parameter) for parameter in factors}
    kinds: dict[nn.Parameter, str] = {
        parameter: _kind_of(name, parameter, id(parameter) in factor_ids)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for key, ratios in (("lr_ratio", lr_ratio), ("weight_decay_ratio", decay_ratio)):
        _check_kinds(key, ratios, set(kinds.values()))
    options = {
        kind: {
            "weight_decay": weight_decay * getattr(decay_ratio, kind),
            "lr_ratio": getattr(lr_ratio, kind),
        }
        for kind in NAME_OF_KIND
    }
    groups: dict[str, dict[str, Any]] = {}
    separate = set(apart)
    for kind, base in NAME_OF_KIND.items():
        same = options[kind] == options["norms" if base == "vectors" else base]
        same &= kind not in separate
        groups.setdefault(base if same else kind, {"params": [], **options[kind]})
    for parameter, kind in kinds.items():
        groups[kind if kind in groups else NAME_OF_KIND[kind]]["params"].append(parameter)
    for group in groups.values():
        if group["lr_ratio"] == 1:
            del group["lr_ratio"]
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _kind_of(name: str, parameter: nn.Parameter, is_factor: bool) -> str:
    if is_factor:
        return "factors"
    if parameter.dim() < 2:
        return "sparse" if hasattr(parameter, "row_blocks") else "norms"
    return OUTER_PARTS.get(name.partition(".")[0], "matrices")


def _check_kinds(
    key: str, ratios: LearningRateRatios | WeightDecayRatios, present: set[str]
) -> None:
    for kind, field in type(ratios).model_fields.items():
        value = getattr(ratios, kind)
        if kind not in present and value != field.default:
            raise UserError(
                f"optimizer.{key}.{kind} = {value}: the model has no parameters of this kind, but "
                f"{', '.join(name for name in type(ratios).model_fields if name in present)}; "
                "leave the key out"
            )


def describe_groups(groups: Iterable[dict[str, Any]], lr: float) -> dict[str, dict[str, float]]:
    """Name to peak learning rate and weight decay of each group; ``lr``: the run's peak."""
    return {
        group["name"]: {
            "lr": lr * group.get("lr_ratio", 1.0),
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    }
