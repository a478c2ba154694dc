"""``optimizer.*``: the update rule. One class an optimizer, told apart by ``name``.

To add one, write its class here and append it to ``OptimizerConfig``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from megalr.config.base import Betas, Section


class AdamWOptimizer(Section):
    """AdamW as in torch.optim.AdamW: bias-corrected moments, decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0, examples=[1.5e-3])
    """Peak learning rate: the schedule multiplies it by a factor of at most 1."""
    betas: Betas = Field(default=(0.9, 0.999), examples=[[0.9, 0.999]])
    """Decay rates of the first and second moment, a number in [0, 1) each."""
    eps: float = Field(default=1e-8, gt=0, examples=[1e-8])
    """Added to the root of the bias-corrected second moment."""
    weight_decay: float = Field(default=0.0, ge=0, examples=[0.01])
    """Decoupled weight decay: an update shrinks the weights by learning rate x weight_decay."""

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers in [0, 1)")
        return betas


OptimizerConfig = AdamWOptimizer
"""``Annotated[A | B, Field(discriminator="name")]`` as soon as there is a second class."""
