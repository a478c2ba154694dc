"""``method.*``: how the weight matrices of the target linears are parametrised and trained.

One class a method, told apart by ``name``. To add a method, write its class here and append it to
``MethodConfig``: the error messages, the option lists and docs/config.md follow from the class.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from megalr.config.base import AsTuple, Section
from megalr.config.projected import ALL_PROJECTIONS, ProjectedMethods, Projection


class FullRankMethod(Section):
    """Every weight matrix is stored and trained whole."""

    name: Literal["full_rank"] = "full_rank"


class LowRankMethod(Section):
    """Target matrices are stored as factors, W = (alpha / rank) B A; no full matrix is kept."""

    name: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=1, examples=[128])
    """Rank r of the factors: B is (out, r), A is (r, in)."""
    alpha: float = Field(default=32.0, gt=0, examples=[32])
    """Scale of the product: W = (alpha / rank) B A. It also scales the gradients of both factors,
    so a good learning rate depends on it."""
    targets: Annotated[tuple[Projection, ...], AsTuple] = Field(
        default=ALL_PROJECTIONS, min_length=1, examples=[["q", "k", "v", "o"]]
    )
    """Projections of every layer that are factorised; the others stay whole."""
    init: Literal["kaiming", "full_rank_variance"] = Field(default="kaiming", examples=["kaiming"])
    """How the factors start. kaiming: both Kaiming-uniform (a = sqrt 5), as published.
    full_rank_variance: normal factors scaled so that the entries of W have the variance of the
    full-rank initialisation."""

    @field_validator("targets")
    @classmethod
    def _no_target_twice(cls, targets: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if len(set(targets)) != len(targets):
            raise ValueError("must not name a projection twice")
        return targets


MethodConfig = Annotated[
    FullRankMethod | LowRankMethod | ProjectedMethods, Field(discriminator="name")
]
