"""The configuration of a run: every section, every key, its meaning, unit and default.

The docstring below a field is its documentation: docs/config.md is generated from it. What is
checked across keys is in ``megalr.config.checks``.
"""

from __future__ import annotations

import os.path
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megalr.config.base import Folder, Section
from megalr.config.checks import cross_problems
from megalr.config.health import HealthConfig
from megalr.config.methods import FullRankMethod, MethodConfig
from megalr.config.model import ModelConfig
from megalr.config.optimizers import OptimizerConfig
from megalr.config.restarts import RestartsConfig
from megalr.config.schedules import CosineSchedule, ScheduleConfig


class RunSection(Section):
    """Folder, seed and resumption of the run."""

    dir: Folder = Field(min_length=1, examples=["runs/llama_60m"])
    """Folder of the run: configuration, metrics, checkpoints."""
    seed: int = Field(default=42, ge=0, examples=[42])
    """Seed of the initial weights and of the data order."""
    resume: Literal["auto", "never", "must"] = Field(default="auto", examples=["must"])
    """auto: continue when the folder holds this run, start when it is empty. never: start, and
    refuse a folder that holds a run. must: continue, and refuse a folder without a checkpoint."""
    fork_from: Folder | None = Field(default=None, min_length=1, examples=["runs/base@8000"])
    """Run whose checkpoint a new run starts from: FOLDER@UPDATE, or FOLDER for its newest one; null
    = from new or pretrained weights. A run that has a checkpoint of its own continues from that."""
    fork_state: Literal["all", "weights"] = Field(default="all", examples=["weights"])
    """What fork_from takes over. all: weights, optimizer states, the update number and the position
    in the data. weights: these alone; the optimizer and the data start at update 0."""
    timeout_seconds: float = Field(default=1800.0, gt=0, le=1e8, examples=[1800])
    """How long a collective waits for the other ranks before the run ends with an error, and the
    start for the last rank, which is given 600 at most (seconds)."""


class DataSource(Section):
    """One preprocessed data set of a mixture."""

    path: Folder = Field(min_length=1, examples=["data/c4"])
    """Folder that `megalr data` wrote."""
    weight: float | None = Field(default=None, gt=0, examples=[0.7])
    """Share of the samples that come from here, relative to the other weights; null (then for all
    of them) = in proportion to the sizes."""


def _sources(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


ValidationPaths = tuple[str, ...] | dict[str, tuple[str, ...]]
"""Folders of one set, or of several by name."""


def _validation_paths(value: Any) -> ValidationPaths | None:
    """Any of the forms of ``data.validation``; a union's own errors would name its members."""
    if value is None:
        return None
    if not isinstance(value, dict):
        return _folders(value)
    if not value:
        raise ValueError("must name at least one set")
    for name in value:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise ValueError(f"must have names of letters, digits and _ . -, not {name!r:.40}")
    return {name: _folders(paths) for name, paths in value.items()}


def _folders(value: Any) -> tuple[str, ...]:
    paths = (value,) if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(p, str) for p in paths):
        raise ValueError("must be a folder, a list of folders, or a mapping of names to these")
    return tuple(map(os.path.expanduser, paths))


class DataConfig(Section):
    """Training and validation data."""

    train: Annotated[tuple[DataSource, ...], BeforeValidator(_sources)] = Field(
        min_length=1, examples=["data/c4", [{"path": "data/c4", "weight": 0.9}]]
    )
    """Training data: one preprocessed folder, a list of them, or a list of {path, weight}."""
    validation: Annotated[
        ValidationPaths | None,
        BeforeValidator(_validation_paths, json_schema_input_type=str | ValidationPaths | None),
    ] = Field(default=None, examples=["data/c4-validation"])
    """Validation data: one preprocessed folder or a list of them; null = the documents that
    preprocessing held out in the training folder, if any; no evaluation otherwise. Several sets
    have names, {c4: data/c4-validation, mix: data/mix-validation}: the first is the one that counts
    for checkpoint.keep_best and in reports."""
    sequence_length: int = Field(default=256, ge=2, le=100_000_000, examples=[256])
    """Positions of a sample (tokens)."""
    packing: bool = Field(default=True, examples=[True])
    """true: samples are windows of the token stream, no position is wasted. false: one document a
    sample, cut at sequence_length and padded, as in the published comparisons."""
    document_mask: bool = Field(default=False, examples=[True])
    """Whether attention stays within documents and positions restart at each, with packing: loss
    and gradients of a window are those of its documents alone, in training and evaluation. No
    position then predicts the first token of the next document."""
    prefetch_updates: int = Field(default=2, ge=0, examples=[2])
    """Batches prepared ahead of the training step (updates)."""

    @field_validator("train")
    @classmethod
    def _weights_for_all_or_none(cls, train: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        if len({source.weight is None for source in train}) > 1:
            raise ValueError("must give a weight to every item or to none")
        return train

    @property
    def validation_sets(self) -> dict[str, tuple[str, ...]]:
        """Folders of each validation set by its name, "" if it has none; {} without any."""
        if isinstance(self.validation, dict):
            return self.validation
        return {"": self.validation} if self.validation else {}


class TrainConfig(Section):
    """The loop: how long, in which batches, in which precision."""

    updates: int = Field(ge=1, le=1_000_000_000_000, examples=[11000])
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(ge=1, le=1_000_000_000, examples=[512])
    """Sequences that one update sees, over all ranks."""
    micro_batch_size: int = Field(ge=1, le=1_000_000_000, examples=[32])
    """Sequences that one data-parallel rank sends through the model at a time."""
    gradient_accumulation: int | None = Field(default=None, ge=1, examples=[4])
    """Micro-batches that a rank adds up before an update; null = global_batch_size /
    (micro_batch_size x number of data-parallel ranks)."""
    precision: Literal["bf16", "paper_bf16", "fp32"] = Field(default="bf16", examples=["bf16"])
    """bf16: compute in bfloat16, master weights and optimizer state in float32. paper_bf16: master
    weights, gradients and optimizer state in bfloat16 too, as in the published runs (these are
    ZeRO stage 0, the fastest on one GPU). fp32: all in float32."""
    gradient_clipping: float = Field(default=1.0, ge=0, examples=[1.0])
    """Largest global norm of the gradient; larger ones are scaled down to it; 0 = no clipping."""
    compile: bool = Field(default=False, examples=[True])
    """Whether the decoder layers are compiled by torch.compile."""
    cuda_graphs: bool = Field(default=False, examples=[True])
    """Whether forward and backward of a micro-batch run as one CUDA graph, which takes launching
    kernels off the critical path: for small models on a GPU; not with ZeRO stage 3 or offload."""
    activation_checkpointing: Literal["none", "elementwise", "mlp", "bottleneck", "full"] = Field(
        default="none", examples=["elementwise"]
    )
    """Activations that the backward pass recomputes. elementwise: norms and activation functions,
    nearly free. mlp: the products with B of o, gate and up as well. bottleneck: all but the vectors
    between the factors, whose products with A are not repeated. full: every layer, from its input.
    mlp and bottleneck: for low_rank and cola with all targets. elementwise: not for lora and
    relora."""
    kernels: Literal["auto", "torch"] = Field(default="auto", examples=["torch"])
    """auto: custom kernels where there is one for the device, dtype and shape (loss, causal
    attention of short sequences, residual sums with RMSNorm, SwiGLU with the product that follows,
    gradients of embedding and head, AdamW of bf16 states). torch: their PyTorch references only."""


class ParallelConfig(Section):
    """How the ranks share a model; what is not tensor-parallel is data-parallel."""

    tensor: int = Field(default=1, ge=1, examples=[2])
    """Ranks that share one copy of the model (tensor parallelism); a divisor of the number of
    ranks, of the heads and of the padded sizes. Neighbouring ranks form a group."""
    layout: Literal["auto", "column_row", "bottleneck"] = Field(
        default="auto", examples=["bottleneck"]
    )
    """Which factors are cut. column_row: one factor of each matrix, for every method. bottleneck:
    both, with the residual stream cut as well; low_rank and cola only. auto: bottleneck from a
    hidden size of 2048 on where method and model allow it, else column_row."""


class EvaluationConfig(Section):
    """Evaluation on the validation data; the last update is always evaluated."""

    every: int = Field(default=1000, ge=0, examples=[1000])
    """Updates between two evaluations; 0 = only at the end."""
    tokens: int | None = Field(default=10_000_000, ge=1, examples=[10_000_000])
    """Evaluate on at most this many target tokens (tokens); null = on all."""
    final_tokens: int | None = Field(default=None, ge=1, examples=[10_000_000])
    """The same for the evaluation after the last update (tokens); null = evaluation.tokens. The
    smaller set is a part of the larger, so few tokens on the way and many at the end cost little
    and give a figure to print."""
    micro_batch_size: int | None = Field(default=None, ge=1, examples=[64])
    """Sequences that a rank evaluates at a time; null = train.micro_batch_size."""

    def limit(self, last: bool) -> int | None:
        """Target tokens at most of the evaluation after the last update, or of another."""
        return self.final_tokens if last and self.final_tokens is not None else self.tokens


class CheckpointConfig(Section):
    """Checkpoints; one is also written when a run is stopped by a signal."""

    every: int = Field(default=1000, ge=0, examples=[1000])
    """Updates between two checkpoints; 0 = only at the end."""
    at_end: bool = Field(default=True, examples=[False])
    """Whether a run that comes to its end is saved; false suits the runs of a sweep, of which only
    the metrics are wanted."""
    keep_last: int = Field(default=2, ge=1, examples=[2])
    """Newest checkpoints kept; older ones are deleted unless the next two keys keep them."""
    keep_every: int = Field(default=0, ge=0, examples=[10000])
    """Checkpoints at multiples of this are kept permanently (updates); 0 = none."""
    keep_best: int = Field(default=0, ge=0, examples=[1])
    """Checkpoints with the lowest validation loss that are kept; only those count that were
    evaluated at their update (evaluation.every)."""
    verify: bool = Field(default=True, examples=[False])
    """Whether the checksums of a checkpoint are compared before it is loaded; sizes always are."""


class LogConfig(Section):
    """Metrics beside metrics.jsonl, which is always written."""

    every: int = Field(default=10, ge=1, examples=[10])
    """Updates between two lines of metrics."""
    tensorboard: bool = Field(default=True, examples=[True])
    """Whether metrics are also written for TensorBoard."""
    wandb_project: str | None = Field(default=None, min_length=1, examples=["megalr"])
    """Weights & Biases project that metrics are also sent to; null = off."""


_NAMED_SECTIONS = {"method": "full_rank", "optimizer": "adamw", "schedule": "cosine"}


class RunConfig(Section):
    """The whole configuration of a run."""

    run: RunSection
    model: ModelConfig
    method: MethodConfig = FullRankMethod()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = CosineSchedule()
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    restarts: RestartsConfig = RestartsConfig()
    health: HealthConfig = HealthConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _name_sections(cls, values: Any) -> Any:
        """Give a section without a name the default one, so that ``optimizer: {lr: 1}`` works."""
        if not isinstance(values, dict):
            return values
        named = dict(values)
        for section, name in _NAMED_SECTIONS.items():
            if isinstance(named.get(section), dict):
                named[section] = {"name": name, **named[section]}
        return named

    @model_validator(mode="after")
    def _check_across_sections(self) -> RunConfig:
        def value_of(key: str) -> Any:
            section, name = key.split(".")
            return getattr(getattr(self, section), name, None)

        problems = [f"{key}: {text}" for key, text in cross_problems(value_of)]
        if problems:
            raise ValueError("; ".join(problems))
        return self
