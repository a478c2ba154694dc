"""``optimizer.*``: the update rule. One class per optimizer, selected by ``name``.

The classes declare names, defaults and limits for the optimizers of ``megalr.optim`` as well. To
add one, write its class here and append it to ``OptimizerConfig``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from megalr.config.base import Betas, Section

ADAMW_EPS = 1e-8


class LearningRateRatios(Section):
    """Learning rates by kind of parameter, as multiples of ``optimizer.lr``."""

    embedding: float = Field(default=1.0, gt=0, le=10_000, examples=[4.0])
    """Token embedding and learned positions; with model.tie_embeddings the head as well."""
    head: float = Field(default=1.0, gt=0, le=10_000, examples=[4.0])
    """Output head."""
    norms: float = Field(default=1.0, gt=0, le=10_000, examples=[1.0])
    """Weights of norms, and biases."""
    factors: float = Field(default=1.0, gt=0, le=10_000, examples=[1.0])
    """Factors of factorized matrices."""
    sparse: float = Field(default=1.0, gt=0, le=10_000, examples=[1.0])
    """Sparse values of SLTrain."""
    matrices: float = Field(default=1.0, gt=0, le=10_000, examples=[1.0])
    """Projection matrices of the layers that are not factorized."""


class WeightDecayRatios(Section):
    """Weight decay by kind of parameter, as multiples of ``optimizer.weight_decay``."""

    embedding: float = Field(default=1.0, ge=0, le=10_000, examples=[0.0])
    """Token embedding and learned positions; with model.tie_embeddings the head as well."""
    head: float = Field(default=1.0, ge=0, le=10_000, examples=[1.0])
    """Output head."""
    norms: float = Field(default=0.0, ge=0, le=10_000, examples=[0.0])
    """Weights of norms, and biases."""
    factors: float = Field(default=1.0, ge=0, le=10_000, examples=[1.0])
    """Factors of factorized matrices."""
    sparse: float = Field(default=1.0, ge=0, le=10_000, examples=[1.0])
    """Sparse values of SLTrain."""
    matrices: float = Field(default=1.0, ge=0, le=10_000, examples=[1.0])
    """Projection matrices of the layers that are not factorized."""


class AdamSection(Section):
    """Options of every optimizer: all of them keep Adam's moments for some tensors."""

    lr: float = Field(gt=0, examples=[1.5e-3])
    """Peak learning rate: the schedule multiplies it by a factor of at most 1."""
    betas: Betas = Field(default=(0.9, 0.999), examples=[[0.9, 0.999]])
    """Decay rates of the first and second moment, each in [0, 1)."""
    weight_decay: float = Field(default=0.0, ge=0, examples=[0.01])
    """Decoupled weight decay: an update shrinks the weights by learning rate x weight_decay."""
    lr_ratio: LearningRateRatios = Field(
        default=LearningRateRatios(), examples=[{"embedding": 4.0, "head": 4.0}]
    )
    """Learning rates by kind of parameter, as multiples of lr; the keys are below."""
    weight_decay_ratio: WeightDecayRatios = Field(
        default=WeightDecayRatios(), examples=[{"embedding": 0.0}]
    )
    """Weight decay by kind of parameter, as multiples of weight_decay; the keys are below. A decay
    acts through the learning rate of its kind."""

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers in [0, 1)")
        return betas

    @field_validator("weight_decay_ratio")
    @classmethod
    def _ratio_of_something(
        cls, ratios: WeightDecayRatios, info: ValidationInfo
    ) -> WeightDecayRatios:
        if info.data.get("weight_decay") == 0 and ratios != WeightDecayRatios():
            raise ValueError("has no effect: optimizer.weight_decay is 0")
        return ratios


class AdamWOptimizer(AdamSection):
    """AdamW as in torch.optim.AdamW: bias-corrected moments, decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    eps: float = Field(default=ADAMW_EPS, gt=0, examples=[1e-8])
    """Added to the root of the bias-corrected second moment."""
    stochastic_rounding: Literal["none", "moments", "weights", "all"] = Field(
        default="none", examples=["moments"]
    )
    """What is rounded to bfloat16 up or down at random, so that the result is right on average,
    instead of to the nearest number, where small changes are lost: the optimizer's moments, the
    weights, or all. Only with train.precision paper_bf16 and methods without an update rule."""


class SPAMOptimizer(AdamSection):
    """SPAM: Adam with spike clipping, periodic reset of the moments and an optional mask."""

    name: Literal["spam"] = "spam"
    eps: float = Field(default=1e-6, gt=0, examples=[1e-6])
    """Added to the root of the second moment, before the bias correction."""
    threshold: float = Field(default=5000.0, ge=0, examples=[5000])
    """A gradient element g with g^2 > threshold x second moment is clipped; 0 = no clipping."""
    update_gap: int = Field(default=500, ge=0, examples=[500])
    """Updates between two resets of the moments; 0 = none."""
    warmup_epoch: int = Field(default=150, ge=0, examples=[150])
    """Updates over which the learning rate recovers after a reset, a cosine from 1 %."""
    grad_accu_steps: int = Field(default=20, ge=0, examples=[20])
    """Updates after the start and after each reset without clipping."""
    density: float = Field(default=1.0, gt=0, le=1, examples=[1.0])
    """Share of the elements of target matrices that are trained at a time, by a random mask."""
    compat: Literal["none", "published"] = Field(default="none", examples=["published"])
    """published: elements whose second moment is still zero are clipped to zero, and target
    matrices get no weight decay, as in the published code."""


class StableSPAMOptimizer(AdamSection):
    """Stable-SPAM: spikes rescaled, gradient norms stabilized, moments reset now and then."""

    name: Literal["stable_spam"] = "stable_spam"
    eps: float = Field(default=1e-8, gt=0, examples=[1e-8])
    """Added to the root of the bias-corrected second moment."""
    gamma1: float = Field(default=0.85, ge=-1, lt=1, examples=[0.85])
    """Decay rate of the average gradient norm; -1 = the first of betas."""
    gamma2: float = Field(default=0.999, ge=0, lt=1, examples=[0.99999])
    """Decay rate of the average squared gradient norm."""
    gamma3: float = Field(default=0.999, ge=0, lt=1, examples=[0.999])
    """Decay rate of the average largest element, beyond which elements are rescaled."""
    total_T: int | None = Field(default=None, ge=1, examples=[20000])
    """Updates over which the first of betas and gamma1 are annealed by a cosine to eta times
    their value; null = train.updates."""
    eta: float = Field(default=0.5, ge=0, le=1, examples=[0.5])
    """Factor of the annealed decay rates at the end; 1 = no annealing."""
    update_gap: int = Field(default=500, ge=0, examples=[1000])
    """Updates between two resets of the moments; 0 = none."""
    compat: Literal["none", "published"] = Field(default="none", examples=["published"])
    """published: the old moments make one more step at a reset, bias corrections of the averages
    restart with it, and annealing is periodic, as in the published code."""

    @field_validator("gamma1")
    @classmethod
    def _decays_or_beta(cls, gamma1: float) -> float:
        if -1 < gamma1 < 0:
            raise ValueError("must be in [0, 1), or -1")
        return gamma1


class _OrthogonalSection(AdamSection):
    """Options of Muon and its relatives."""

    betas: Betas = Field(default=(0.9, 0.95), examples=[[0.9, 0.95]])
    """AdamW's decay rates, each in [0, 1)."""
    eps: float = Field(default=1e-10, gt=0, examples=[1e-10])
    """Added to the root of AdamW's bias-corrected second moment."""
    momentum: float = Field(default=0.95, ge=0, lt=1, examples=[0.95])
    """Decay rate of the momentum of target matrices."""
    adam_lr_ratio: float = Field(default=0.015, gt=0, examples=[0.015])
    """AdamW's learning rate as a share of lr (lr is the spectral norm of a matrix update)."""
    ns_method: Literal["gram", "standard"] = Field(default="gram", examples=["gram"])
    """Form of the Newton-Schulz iteration: gram is faster and runs in fp16 (float32 on a CPU that
    does not compute in fp16), standard in bf16."""


class MuonOptimizer(_OrthogonalSection):
    """Muon: orthogonalized momentum for target matrices, AdamW for everything else."""

    name: Literal["muon"] = "muon"
    fraction: float = Field(default=1.0, gt=0, le=1, examples=[0.25])
    """Share of a matrix's rows (of its columns, if they are fewer) that an update orthogonalizes
    and moves, those with the largest momentum. Below 1 the rule is Dion2's: cheaper."""


class NorMuonOptimizer(_OrthogonalSection):
    """NorMuon: Muon whose rows are divided by the root of their second moment."""

    name: Literal["normuon"] = "normuon"
    fraction: float = Field(default=1.0, gt=0, le=1, examples=[0.25])
    """Share of a matrix's rows that an update orthogonalizes and moves, those with the largest
    momentum. Below 1 the rule is NorDion2's: cheaper."""
    muon_beta2: float = Field(default=0.95, ge=0, lt=1, examples=[0.95])
    """Decay rate of the second moment of a row, the mean of its squares."""


class SCALEOptimizer(AdamSection):
    """SCALE: gradients normalized row by row, momentum for the output head, Adam for vectors."""

    name: Literal["scale"] = "scale"
    eps: float = Field(default=1e-8, gt=0, examples=[1e-8])
    """Added to the root of Adam's second moment (norms, biases), before the bias correction."""
    momentum: float = Field(default=0.9, ge=0, lt=1, examples=[0.9])
    """Decay rate of the average gradient of the output head."""


class SpectronOptimizer(_OrthogonalSection):
    """Spectron: orthogonalized momentum for pairs of factors, scaled by their spectral norms; AdamW
    for everything else. Needs method low_rank with alpha equal to rank."""

    name: Literal["spectron"] = "spectron"
    momentum: float = Field(default=0.95, ge=0, lt=1, examples=[0.95])
    """Decay rate of the momentum of the factors."""
    adam_lr_ratio: float = Field(default=0.1, gt=0, examples=[0.1])
    """AdamW's learning rate as a share of lr (lr bounds the spectral norm of the change of B A)."""


OptimizerConfig = Annotated[
    AdamWOptimizer
    | SPAMOptimizer
    | StableSPAMOptimizer
    | MuonOptimizer
    | NorMuonOptimizer
    | SCALEOptimizer
    | SpectronOptimizer,
    Field(discriminator="name"),
]
