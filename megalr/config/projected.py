"""Methods that bring their own update rule for full matrices (LORO: for factors).

``optimizer.name`` must be adamw with them; its learning rate, betas and weight decay are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from megalr.config.base import AsTuple, Section

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o", "gate", "up", "down")


def _none_twice(targets: tuple[Projection, ...]) -> tuple[Projection, ...]:
    if len(set(targets)) != len(targets):
        raise ValueError("must not name a projection twice")
    return targets


Targets = Annotated[tuple[Projection, ...], AsTuple, AfterValidator(_none_twice)]


def _not_full(value: Any) -> Any:
    if value == "full":
        raise ValueError("cannot be full: the scaling of rows or columns needs one projected side")
    return value


OneSide = Annotated[Literal["std", "reverse_std", "left", "right"], BeforeValidator(_not_full)]


class _Projected(Section):
    """Options of all methods that project gradients."""

    rank: int = Field(ge=1, examples=[128])
    """Rank r of the subspace in which moments are kept, at most the smaller side of a matrix."""
    targets: Targets = Field(default=ALL_PROJECTIONS, min_length=1, examples=[["q", "k", "v", "o"]])
    """Projections of every layer that get the rule; all other tensors get plain Adam. q, k, v are
    stored together, and so are gate, up: name all of a group or none."""
    eps: float = Field(default=1e-6, gt=0, examples=[1e-6])
    """Added to the root of the second moment, before the bias correction, for all tensors;
    takes the place of optimizer.eps."""
    update_proj_gap: int = Field(default=200, ge=1, examples=[200])
    """Updates between two renewals of a projector."""
    stagger: bool = Field(default=False, examples=[True])
    """Whether the matrices renew their projectors at different updates, which spreads the cost."""


class _SingularVectors(_Projected):
    """Options of the methods whose projector follows the gradient."""

    basis: Literal["auto", "svd", "subspace"] = Field(default="auto", examples=["svd"])
    """How singular vectors are found. svd: full SVD in fp32, as published. subspace: randomized
    subspace iteration, many times cheaper. auto: subspace where that pays (matrices beyond 128
    and ranks up to three quarters of the smaller side), svd elsewhere."""


class GaLoreMethod(_SingularVectors):
    """GaLore: Adam in the leading singular subspace of each gradient."""

    name: Literal["galore"] = "galore"
    scale: float = Field(default=0.25, gt=0, examples=[0.25])
    """Factor of the update of target matrices."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = Field(
        default="std", examples=["std"]
    )
    """Side that is projected. std: the shorter one; reverse_std: the longer; full: both."""
    limiter: bool = Field(default=False, examples=[True])
    """Whether the norm of an update may grow by at most 1 % from one update to the next."""
    state_bits: Literal[8, 32] = Field(default=32, examples=[8])
    """Bits of a moment's element: 32, or 8 with a scale for each block of 256 elements."""


class FiraMethod(_SingularVectors):
    """Fira: GaLore plus the part of the gradient outside the subspace, scaled like the inside."""

    name: Literal["fira"] = "fira"
    scale: float = Field(default=0.25, gt=0, examples=[0.25])
    """Factor of the update inside the subspace; alpha in the paper."""
    proj_type: OneSide = Field(default="std", examples=["std"])
    """Side that is projected. std: the shorter one; reverse_std: the longer."""
    limiter: bool = Field(default=True, examples=[True])
    """Whether the norm of the residual may grow by at most 1 % from one update to the next."""
    compat: Literal["none", "published"] = Field(default="none", examples=["published"])
    """published: the residual keeps 1 - scale of the gradient inside the subspace, as in the
    published code."""


class _ApolloOptions(_SingularVectors):
    """Options of APOLLO and APOLLO-Mini."""

    proj: Literal["random", "svd"] = Field(default="random", examples=["random"])
    """random: a Gaussian projection, drawn again from its seed and never stored. svd: leading
    singular vectors, found as basis says."""
    proj_type: OneSide = Field(default="std", examples=["std"])
    """Side that is projected. std: the shorter one; reverse_std: the longer."""
    limiter: bool = Field(default=True, examples=[True])
    """Whether the norm of an update may grow by at most 1 % from one update to the next."""
    compat: Literal["none", "published"] = Field(default="none", examples=["published"])
    """published: the limiter also holds on to a norm of zero, as in the published code."""


class ApolloMethod(_ApolloOptions):
    """APOLLO: the gradient, each channel scaled by what Adam does in a random subspace."""

    name: Literal["apollo"] = "apollo"
    scale: float = Field(default=1.0, gt=0, examples=[1.0])
    """The update is multiplied by the square root of this."""
    scale_type: Literal["channel", "tensor"] = Field(default="channel", examples=["channel"])
    """One scale for each row or column, or one for the matrix."""
    scale_front: bool = Field(default=False, examples=[False])
    """Whether the square root of scale is applied before the limiter instead of after it."""


class ApolloMiniMethod(_ApolloOptions):
    """APOLLO-Mini: APOLLO of rank 1 with one scale for each matrix."""

    name: Literal["apollo_mini"] = "apollo_mini"
    rank: int = Field(default=1, ge=1, examples=[1])
    """Rank r of the subspace in which moments are kept."""
    scale: float = Field(default=128.0, gt=0, examples=[128.0])
    """The update is multiplied by the square root of this."""
    scale_type: Literal["channel", "tensor"] = Field(default="tensor", examples=["tensor"])
    """One scale for the matrix, or one for each row or column."""
    scale_front: bool = Field(default=False, examples=[True])
    """Whether the square root of scale is applied before the limiter instead of after it."""


class GoLoreMethod(_SingularVectors):
    """GoLore: GaLore whose subspaces become random late in training, with rotated momentum."""

    name: Literal["golore"] = "golore"
    rand_ratio: float = Field(default=0.8, ge=0, le=1, examples=[0.8])
    """Share of the run that uses singular vectors; random orthonormal bases afterwards."""
    kappa: float = Field(default=1.0, gt=0, examples=[1.0])
    """Factor of the projected gradient and of the update."""


class Factorized(Section):
    """Options of the methods whose weight matrices are stored as factors."""

    rank: int = Field(ge=1, examples=[128])
    """Rank r of the factors: B is (out, r), A is (r, in)."""
    targets: Targets = Field(default=ALL_PROJECTIONS, min_length=1, examples=[["q", "k", "v", "o"]])
    """Projections of every layer that are factorized; the others stay whole. q, k, v are stored
    together, and so are gate, up: name all of a group or none."""


class LOROMethod(Factorized):
    """LORO: W = B A trained by Riemannian steps on the manifold of rank-r matrices."""

    name: Literal["loro"] = "loro"
    eps: float = Field(default=1e-6, gt=0, examples=[1e-6])
    """Added to the root of the second moment, before the bias correction, for all tensors;
    takes the place of optimizer.eps."""
    exact_every: int = Field(default=500, ge=1, examples=[500])
    """Updates from one exact Riemannian step to the next; those between are approximate."""
    refresh_every: int | None = Field(default=None, ge=1, examples=[500])
    """Updates between two restarts of the moments; null = exact_every."""
    refresh: Literal["all", "factors", "none"] = Field(default="all", examples=["all"])
    """Which tensors' moments restart."""
    lr_scaler: float = Field(default=-1.0, examples=[-1.0])
    """Learning rate of approximate steps relative to the optimizer's; -1 = rank / hidden size."""

    @field_validator("lr_scaler")
    @classmethod
    def _positive_or_rank(cls, lr_scaler: float) -> float:
        if lr_scaler <= 0 and lr_scaler != -1:
            raise ValueError("must be above 0, or -1")
        return lr_scaler


ProjectedMethods = (
    GaLoreMethod | FiraMethod | ApolloMethod | ApolloMiniMethod | GoLoreMethod | LOROMethod
)
PROJECTED_NAMES: tuple[str, ...] = tuple(
    method.model_fields["name"].default for method in get_args(ProjectedMethods)
)
"""Names of the methods that bring their own update rule."""
