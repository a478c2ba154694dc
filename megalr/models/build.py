"""From a method's settings to a decoder with the right kind of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.layers.cola import CoLALinear
from megalr.layers.factors import LinearShape
from megalr.layers.linear import (
    BottleneckLinear,
    DenseLinear,
    GroupedLinear,
    LowRankLinear,
)
from megalr.layers.lora import LoRALinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.config import DecoderConfig, decoder_config
from megalr.models.decoder import Decoder, MakeLinear
from megalr.models.plans import check_plan, make_plan
from megalr.models.recompute import FOR_FACTORS
from megalr.tensor_parallel.mesh import ONE_RANK, Mesh
from megalr.tensor_parallel.plan import SINGLE, Plan

FACTORIZED = ("low_rank", "loro", "sltrain", "lora", "relora", "cola")
"""Methods whose target matrices are stored as factors."""

SparseIndices = Mapping[str, np.ndarray]
"""Positions of SLTrain's sparse parts by matrix, where they are not drawn from the seed."""


def projection_names(shape: LinearShape) -> list[str]:
    """Short names of a group's matrices: ``["q", "k", "v"]``."""
    return [name.rsplit(".", 1)[1] for name in shape.names]


def make_linear_of(method: Any, seed: int, supports: SparseIndices | None = None) -> MakeLinear:
    """The builder of linear layers for a method; ``seed`` or ``supports`` give those of SLTrain.

    A method without factors (full_rank, and those that are an optimizer) makes dense layers.

    Raises:
        UserError: rank larger than a matrix, or targets that split a group.
    """
    if method.name not in FACTORIZED:
        return DenseLinear

    def make(shape: LinearShape, bias: bool) -> GroupedLinear:
        if not _is_target(method, shape):
            return DenseLinear(shape, bias)
        if method.name == "low_rank":
            return LowRankLinear(shape, method.rank, method.alpha, method.init, bias)
        if method.name == "loro":
            return LowRankLinear(shape, method.rank, float(method.rank), "xavier", bias)
        if method.name == "sltrain":
            return SLTrainLinear(
                shape, method.rank, method.alpha, method.density, seed, bias, supports
            )
        if method.name == "cola":
            return CoLALinear(shape, method.rank, bias)
        return LoRALinear(shape, method.rank, method.alpha, bias)

    return make


def _is_target(method: Any, shape: LinearShape) -> bool:
    """Whether the method factorizes this group; its rank must fit then."""
    names = projection_names(shape)
    chosen = [name for name in names if name in method.targets]
    if chosen and chosen != names:
        raise UserError(
            f"method.targets names {', '.join(chosen)} but not "
            f"{', '.join(n for n in names if n not in chosen)}: {', '.join(names)} read the same "
            "input and are stored together, so name all of them or none"
        )
    sides = [min(shape.in_used, rows) for rows in shape.out_used]
    if chosen and method.rank > min(sides):
        raise UserError(
            f"method.rank {method.rank} is larger than {min(sides)}, the smaller side of "
            f"{shape.names[sides.index(min(sides))]}: choose a rank of at most {min(sides)}"
        )
    return bool(chosen)


def build_decoder(
    config: DecoderConfig,
    method: Any,
    seed: int,
    recompute: str = "none",
    plan: Plan = SINGLE,
    supports: SparseIndices | None = None,
    drawn: bool = True,
) -> Decoder:
    """A decoder in float32 on the default device with weights drawn from ``seed``.

    The weights of all ranks of ``plan`` together do not depend on the plan. ``drawn`` False leaves
    them as they were allocated, which device meta asks for.

    Raises:
        UserError: rank or targets that do not fit the model, a plan that does not, or
            ``recompute`` mlp or bottleneck where some matrix is not just its factors, or
            elementwise for LoRA.
    """
    check_plan(config, method, plan)
    decoder = Decoder(config, make_linear_of(method, seed, supports), recompute, plan)
    if recompute in FOR_FACTORS:
        _check_bottlenecks(decoder, method, recompute)
    if recompute == "elementwise" and method.name in ("lora", "relora"):
        raise UserError(
            f"train.activation_checkpointing elementwise keeps both products of a {method.name} "
            "layer, more than none does: use none or full"
        )
    if drawn:
        decoder.reset_parameters(seed)
    return decoder


def _check_bottlenecks(decoder: Decoder, method: Any, recompute: str) -> None:
    """Raise UserError unless every matrix is a product of factors and nothing else."""
    for linear in decoder.linears():
        if not isinstance(linear, BottleneckLinear):
            raise UserError(
                f"train.activation_checkpointing {recompute} keeps what passes between factors, "
                f"but {linear.shape.names[0]} is a {type(linear).__name__} (method {method.name}): "
                "use none, elementwise or full, or low_rank or cola with all targets"
            )


def sizes_of(config: RunConfig) -> DecoderConfig:
    """The decoder's sizes; those of a pretrained model must have been filled in."""
    values = {key: value for key, value in config.model.model_dump().items() if value is not None}
    return decoder_config(values.pop("preset", None), values)


def build_model(
    config: RunConfig,
    device: torch.device,
    mesh: Mesh = ONE_RANK,
    supports: SparseIndices | None = None,
) -> Decoder:
    """This rank's part of the run's decoder on ``device``, float32, drawn from ``run.seed``.

    ``supports``: of SLTrain's sparse parts, where they are not drawn as well.

    Raises:
        UserError: a method, rank or layout that does not fit the model.
    """
    sizes = sizes_of(config)
    plan = make_plan(sizes, config.method, mesh, config.parallel.layout)
    with device:
        decoder = build_decoder(
            sizes,
            config.method,
            config.run.seed,
            recompute=config.train.activation_checkpointing,
            plan=plan,
            supports=supports,
        )
    return decoder
