"""``method.*``: how the weight matrices of the target linears are parametrized and trained.

One class per method, selected by ``name``. To add a method, write its class here and append it to
``MethodConfig``: the error messages, the option lists and docs/config.md follow from the class.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megalr.config.base import Section
from megalr.config.projected import Factorized, ProjectedMethods


class FullRankMethod(Section):
    """Every weight matrix is stored and trained whole."""

    name: Literal["full_rank"] = "full_rank"


class _Ranked(Factorized):
    """Methods whose matrices may have different ranks."""

    ranks: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        default=None, examples=[{"down": 192, "layers.0.*": 256}]
    )
    """Ranks by name; null = rank everywhere. A name is the last parts of a matrix's name (down,
    attention.q), its full name (layers.3.mlp.down), or a pattern with * for the full name. Of
    several entries that name a matrix the last one counts. alpha is divided by a matrix's own
    rank."""


class _Scaled(_Ranked):
    """Methods whose product of factors is scaled by alpha / rank."""

    alpha: float = Field(default=32.0, gt=0, examples=[32])
    """Scale of the product: (alpha / rank) B A. It also scales the gradients of both factors, so a
    good learning rate depends on it."""


class LrTransfer(Section):
    """The model, usually a smaller one, from which learning rate and alpha are transferred."""

    base_width: int = Field(ge=1, examples=[512])
    """Hidden size of the model that optimizer.lr and method.alpha were found for."""
    base_rank: int = Field(ge=1, examples=[128])
    """Rank of its factors."""


class _Duplicated(_Ranked):
    """Methods whose bottleneck may be duplicated into the outputs (DLR, arXiv 2606.28932)."""

    dlr_alpha: float | None = Field(default=None, gt=0, examples=[1.0])
    """Strength of DLR, a fixed residual from the bottleneck to the outputs: coordinate
    floor(o / K) times dlr_alpha / sqrt(K), K = ceil(m / rank), is added to B z at output o of m.
    No parameters; exports contain it in B. null = none; 1 is published, with low_rank at
    alpha = rank and init normal."""


class LowRankMethod(_Scaled, _Duplicated):
    """Target matrices are stored as factors, W = (alpha / rank) B A; no full matrix is kept."""

    name: Literal["low_rank"] = "low_rank"
    init: Literal["kaiming", "full_rank_variance", "orthogonal", "normal"] = Field(
        default="kaiming", examples=["kaiming"]
    )
    """How the factors start. kaiming: both Kaiming-uniform (a = sqrt 5), as published.
    full_rank_variance: normal factors scaled so that the entries of W have the variance of the
    full-rank initialisation. orthogonal: random orthonormal columns of B and rows of A, so that
    all singular values of both are 1 (for optimizer spectron). normal: both normal with
    standard deviation rank^(-1/4) (m + n)^(-1/4), CoLA's choice and DLR's."""
    lr_transfer: LrTransfer | None = Field(
        default=None, examples=[{"base_width": 512, "base_rank": 128}]
    )
    """optimizer.lr and alpha are those of a model of another width and rank, and follow a rule to
    this one's: the learning rates of factors and head fall as 1 / width, alpha / rank stays. With
    adamw, init kaiming, all targets and an untied head; null = off. Its keys are below."""


class SLTrainMethod(_Scaled):
    """SLTrain: W = (alpha / rank) B A + S, S sparse on a fixed random support."""

    name: Literal["sltrain"] = "sltrain"
    density: float = Field(default=0.01, gt=0, lt=1, examples=[0.03])
    """Share of a matrix's entries that are in the support of S; the published scripts use 0.03."""


class LoraMethod(_Scaled):
    """LoRA: W = W0 + (alpha / rank) B A with W0 frozen; factors, embeddings and norms train."""

    name: Literal["lora"] = "lora"


class ReloraMethod(_Scaled):
    """ReLoRA: LoRA whose product is merged into W0 again and again, with new factors after it.

    Merges and resets come after the first update of a period (1001, 2001, ... for 1000), which with
    schedule.name cosine_restarts is the one whose learning rate is 0.
    """

    name: Literal["relora"] = "relora"
    merge_every: int = Field(ge=2, examples=[1000])
    """Updates between two merges: W0 += (alpha / rank) B A, new random A, B = 0."""
    reset_every: int | None = Field(default=None, ge=2, examples=[1000])
    """Updates between two resets of the factors' moments; null = merge_every."""
    reset: Literal["random", "magnitude", "none"] = Field(default="random", examples=["magnitude"])
    """Entries of the factors' moments that a reset zeroes: random ones, the smallest ones of each
    matrix, or none. Adam's step counter is kept."""
    reset_fraction: float = Field(default=0.999, gt=0, le=1, examples=[0.8])
    """Share of the entries that a reset zeroes; 0.999 random and 0.8 by magnitude are published."""


class ColaMethod(_Duplicated):
    """CoLA: a SiLU between the factors, y = B silu(A x); there is no matrix W."""

    name: Literal["cola"] = "cola"


MethodConfig = Annotated[
    FullRankMethod
    | LowRankMethod
    | SLTrainMethod
    | LoraMethod
    | ReloraMethod
    | ColaMethod
    | ProjectedMethods,
    Field(discriminator="name"),
]
