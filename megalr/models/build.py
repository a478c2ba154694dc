"""From a run's configuration to a decoder: its sizes, its tensor-parallel plan, its layers.

The only file of models/ and layers/ that knows methods by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
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
    FactorizedLinear,
    GroupedLinear,
)
from megalr.layers.lora import LoRALinear
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.mixed_ranks import MixedRankLinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.attention import MakeLinear
from megalr.models.config import DecoderConfig, decoder_config
from megalr.models.decoder import Decoder
from megalr.models.drawing import draw_weights, release
from megalr.models.flops import parameter_count
from megalr.models.lr_transfer import NO_TRANSFER, LrScales, scales_of
from megalr.models.ranks import check_names, ranks_of
from megalr.models.recompute import FOR_FACTORS
from megalr.tensor_parallel.mesh import ONE_RANK, Mesh
from megalr.tensor_parallel.plan import SINGLE, Plan

FACTORIZED = ("low_rank", "loro", "sltrain", "lora", "relora", "cola")
"""Methods that store their target matrices as factors."""

BOTTLENECK_METHODS = ("low_rank", "cola")
"""Methods that layout bottleneck supports: each matrix is a product of two factors, nothing else,
and the optimizer treats the two as separate tensors."""

BOTTLENECK_WIDTH = 2048
"""Hidden size from which ``auto`` chooses layout bottleneck. It is the faster layout there on 2 and
on 4 ranks, column_row at 1024 and below (docs/parallelism.md)."""

_TARGETS = {"q", "k", "v", "o", "gate", "up", "down"}

SparseIndices = Mapping[str, np.ndarray]
"""Positions of SLTrain's sparse entries by matrix name, where they are not drawn from the seed."""


def sizes_of(config: RunConfig) -> DecoderConfig:
    """The decoder's sizes; those of a pretrained model must have been filled in.

    Raises:
        UserError: unknown preset, sizes that do not fit each other, or fewer learned positions than
            a sequence has.
    """
    values = {key: value for key, value in config.model if value is not None}
    sizes = decoder_config(values.pop("preset", None), values)
    length, rows = config.data.sequence_length, sizes.position_rows
    if rows and length > rows:
        raise UserError(
            f"data.sequence_length {length} is more than model.max_positions {rows}, the learned "
            "positions: lower the one or raise the other"
        )
    return sizes


def with_sizes(config: RunConfig) -> RunConfig:
    """The same run with every size and choice of section ``model`` that it takes from its preset.

    A null that is left means none: no window, no scaling, the same in all layers. With
    ``model.from_pretrained`` the sizes are in a folder that may be elsewhere, and the configuration
    is returned as it is.

    Raises:
        UserError: unknown preset, or sizes that do not fit each other.
    """
    if config.model.from_pretrained is not None:
        return config
    sizes = sizes_of(config)
    known = {field.name: getattr(sizes, field.name) for field in fields(DecoderConfig)}
    known |= {"num_kv_heads": sizes.kv_heads, "head_dim": sizes.head_width}
    empty = [name for name, given in config.model if given is None and name in known]
    missing = {name: known[name] for name in empty}
    return config.model_copy(update={"model": config.model.model_copy(update=missing)})


def make_plan(config: DecoderConfig, method: Any, mesh: Mesh, layout: str) -> Plan:
    """The plan for ``parallel.layout``; ``auto`` chooses the faster layout that the model allows.

    Raises:
        UserError: as :func:`check_plan`.
    """
    if layout == "auto":
        fits = mesh.tensor_size > 1 and config.hidden_size >= BOTTLENECK_WIDTH
        fits = fits and _why_not_bottleneck(config, method, mesh.tensor_size) is None
        layout = "bottleneck" if fits else "column_row"
    plan = Plan(mesh, layout)
    check_plan(config, method, plan)
    return plan


def check_plan(config: DecoderConfig, method: Any, plan: Plan) -> None:
    """Check that the decoder can be sharded as planned.

    Raises:
        UserError: a size that the ranks do not divide, or a method or model that layout bottleneck
            does not support; names what would work.
    """
    ranks = plan.mesh.tensor_size
    if ranks == 1:
        return
    fitting = [n for n in range(1, config.num_heads + 1) if not _indivisible_size(config, n)]
    if size := _indivisible_size(config, ranks):
        raise UserError(
            f"parallel.tensor {ranks} does not divide {size}: use one of "
            f"{', '.join(map(str, fitting))}"
        )
    if plan.layout == "bottleneck":
        reason = _why_not_bottleneck(config, method, ranks)
        if reason is not None:
            raise UserError(
                f"parallel.layout bottleneck {reason}: use parallel.layout=column_row or auto"
            )


def _indivisible_size(config: DecoderConfig, ranks: int) -> str | None:
    """Name and value of the first size that ``ranks`` does not divide; None if it divides all."""
    sizes = {
        "model.num_heads": config.num_heads,
        "model.num_kv_heads": config.kv_heads,
        "the padded MLP width": config.padded_intermediate_size,
        "the padded vocabulary": config.padded_vocab_size,
    }
    for name, value in sizes.items():
        if value % ranks:
            pad = f" (set by model.pad_multiple {config.pad_multiple})" if "padded" in name else ""
            return f"{name} {value}{pad}"
    return None


def _why_not_bottleneck(config: DecoderConfig, method: Any, ranks: int) -> str | None:
    """Why layout bottleneck is not possible; None if it is."""
    if method.name not in BOTTLENECK_METHODS:
        names = " and ".join(BOTTLENECK_METHODS)
        return f"needs matrices that are products of factors ({names}), not {method.name}"
    wanted = _TARGETS if config.gated_mlp else _TARGETS - {"gate"}
    missing = sorted(wanted - set(method.targets))
    if missing:
        return f"needs every matrix factorized, but method.targets lacks {', '.join(missing)}"
    if config.norm != "rmsnorm" or config.positions != "rope":
        return "needs RMSNorm and rotary positions"
    if config.hidden_size % ranks:
        return f"needs a hidden size that {ranks} divides, not {config.hidden_size}"
    return None


def has_factors(method: Any) -> bool:
    """Whether the target matrices are stored as factors."""
    return method.name in FACTORIZED


def has_dense_weights(method: Any) -> bool:
    """Whether every layer of the method computes with some dense matrix (not CoLA's, which has a
    nonlinearity between its factors)."""
    return method.name != "cola"


def has_sparse_indices(method: Any) -> bool:
    """Whether layers of the method have sparse entries at fixed positions (SLTrain)."""
    return method.name == "sltrain"


def dlr_alpha_of(method: Any) -> float | None:
    """The strength of DLR's latent residual; None without, and for methods that have none."""
    alpha: float | None = getattr(method, "dlr_alpha", None)
    return alpha


def projection_names(shape: LinearShape) -> list[str]:
    """Short names of a group's matrices: ``["q", "k", "v"]``."""
    return [name.rsplit(".", 1)[1] for name in shape.names]


def make_linear_of(
    method: Any,
    seed: int,
    sparse_indices: SparseIndices | None = None,
    scales: LrScales = NO_TRANSFER,
) -> MakeLinear:
    """The function that builds the linear layers of a method.

    A method without factors (full_rank, and those that only change the optimizer) gets dense
    layers.

    Args:
        method: settings of the method.
        seed: seed of the run, from which SLTrain draws its sparse positions.
        sparse_indices: SLTrain's sparse positions instead of drawn ones.
        scales: of ``method.lr_transfer`` for the model's width.

    Raises:
        UserError: (by the returned function) rank larger than a matrix, or targets that split a
            group.
    """
    if method.name not in FACTORIZED:
        return DenseLinear

    def of_one_rank(shape: LinearShape, rank: int, bias: bool = False) -> FactorizedLinear:
        if method.name == "low_rank":
            alpha = scales.alpha(method.alpha, rank)
            return LowRankLinear(shape, rank, alpha, method.init, bias, dlr_alpha_of(method))
        if method.name == "loro":
            return LowRankLinear(shape, rank, float(rank), "xavier", bias)
        if method.name == "sltrain":
            return SLTrainLinear(
                shape, rank, method.alpha, method.density, seed, bias, sparse_indices
            )
        if method.name == "cola":
            return CoLALinear(shape, rank, bias, dlr_alpha_of(method))
        return LoRALinear(shape, rank, method.alpha, bias)

    def make(shape: LinearShape, bias: bool) -> GroupedLinear:
        if not _is_target(method, shape):
            return DenseLinear(shape, bias)
        ranks = ranks_of(method, shape)
        if len(set(ranks)) > 1:
            return MixedRankLinear(shape, ranks, of_one_rank, bias)
        return of_one_rank(shape, ranks[0], bias)

    return make


def _is_target(method: Any, shape: LinearShape) -> bool:
    """Whether the method factorizes this group."""
    names = projection_names(shape)
    chosen = [name for name in names if name in method.targets]
    if chosen and chosen != names:
        raise UserError(
            f"method.targets names {', '.join(chosen)} but not "
            f"{', '.join(n for n in names if n not in chosen)}: {', '.join(names)} read the same "
            "input and are stored together, so name all of them or none"
        )
    return bool(chosen)


def build_decoder(
    config: DecoderConfig,
    method: Any,
    seed: int,
    recompute: str = "none",
    plan: Plan = SINGLE,
    sparse_indices: SparseIndices | None = None,
    initialize: bool = True,
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
) -> Decoder:
    """A decoder on the default device with weights drawn from ``seed``.

    The whole weights, over all ranks of ``plan``, do not depend on the plan.

    Args:
        config: sizes and choices.
        method: settings of the method.
        seed: seed of the run.
        recompute: level of activation checkpointing, one of models.recompute.LEVELS.
        plan: how the weights are sharded.
        sparse_indices: SLTrain's sparse positions instead of drawn ones.
        initialize: False leaves the weights uninitialized (on device meta, for example).
        dtype: of the weights, which are drawn in float32 and rounded matrix by matrix.
        empty: leave the matrices without memory, for models.drawing to fill.

    Raises:
        UserError: rank, targets or plan do not fit the model; ``recompute`` is mlp or bottleneck
            and some matrix is not just its factors; or it is elementwise for LoRA.
    """
    check_plan(config, method, plan)
    check_names(config, method)
    scales = scales_of(method, config.hidden_size)
    if scales != NO_TRANSFER and config.tie_embeddings:
        raise UserError(
            "method.lr_transfer gives embedding and head different learning rates, and they are "
            "one tensor: use model.tie_embeddings=false, or leave lr_transfer out"
        )
    make_linear = make_linear_of(method, seed, sparse_indices, scales)
    with _parameters_of(dtype):
        made = release if empty else None
        decoder = Decoder(config, make_linear, recompute, plan, made)
    decoder.head.draw_scale = scales.learning_rate
    if recompute in FOR_FACTORS:
        _check_bottlenecks(decoder, method, recompute)
    if recompute == "elementwise" and method.name in ("lora", "relora"):
        raise UserError(
            f"train.activation_checkpointing elementwise keeps both products of a {method.name} "
            "layer, more than none does: use none or full"
        )
    if initialize and not empty:
        draw_weights(decoder, seed)
    return decoder


@contextlib.contextmanager
def _parameters_of(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have parameters of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_bottlenecks(decoder: Decoder, method: Any, recompute: str) -> None:
    """Raise UserError unless each matrix is a product of two factors and nothing else."""
    for linear in decoder.groups():
        if recompute == "mlp" and isinstance(linear, MixedRankLinear):
            raise UserError(
                f"train.activation_checkpointing mlp keeps q, k, v apart from other products by "
                f"their common operator, but the ranks of {', '.join(linear.shape.names)} differ: "
                "use none, elementwise, bottleneck or full"
            )
    for linear in decoder.linears():
        if not isinstance(linear, BottleneckLinear):
            raise UserError(
                f"train.activation_checkpointing {recompute} keeps what passes between factors, "
                f"but {linear.shape.names[0]} is a {type(linear).__name__} (method {method.name}): "
                "use none, elementwise or full, or low_rank or cola with all targets"
            )


def build_model(
    config: RunConfig,
    device: torch.device,
    mesh: Mesh = ONE_RANK,
    sparse_indices: SparseIndices | None = None,
    dtype: torch.dtype | None = None,
    empty: bool = False,
) -> Decoder:
    """This rank's shard of the run's decoder on ``device``, drawn from ``run.seed``.

    Args:
        config: the run's configuration, with all sizes of the model.
        device: where the weights are allocated.
        mesh: the tensor-parallel ranks.
        sparse_indices: SLTrain's sparse positions instead of drawn ones.
        dtype: of the weights; None: the one that the run computes in. Every engine makes its
            float32 masters from weights rounded to that, so nothing else is lost.
        empty: as for :func:`build_decoder`.

    Raises:
        UserError: a method, rank or layout that does not fit the model.
    """
    sizes = sizes_of(config)
    computes_in = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    plan = make_plan(sizes, config.method, mesh, config.parallel.layout)
    with device:
        decoder = build_decoder(
            sizes,
            config.method,
            config.run.seed,
            recompute=config.train.activation_checkpointing,
            plan=plan,
            sparse_indices=sparse_indices,
            dtype=dtype or computes_in,
            empty=empty,
        )
    return decoder


def describe_parameters(config: RunConfig) -> str:
    """Comment: parameters of the whole model without padding, and the trained ones.

    Empty with ``model.from_pretrained``. Builds the decoder without memory for its weights.

    Raises:
        UserError: sizes, rank or targets that do not fit each other.
    """
    if config.model.from_pretrained is not None:
        return ""
    with torch.device("meta"):
        decoder = build_decoder(sizes_of(config), config.method, config.run.seed, initialize=False)
    total, trained = parameter_count(decoder), parameter_count(decoder, trainable_only=True)
    scales = scales_of(config.method, decoder.config.hidden_size)
    followed = scales.comment(getattr(config.method, "alpha", 1.0))
    return f"# parameters: {total:,}; trained: {trained:,}\n{followed}"
