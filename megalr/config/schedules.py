"""The section ``schedule``: how the learning rate changes in the course of a run.

What they compute is in ``megalr.optim.schedules``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megalr.config.base import Section

OnExtend = Annotated[
    Literal["rescale", "hold", "decay"],
    Field(
        description="Learning rate of a run that is extended by another train.updates. rescale: as "
        "if it had been planned so. hold: the last one from there on. decay: from the last one "
        "along a line to min_lr_ratio at the new end.",
        examples=["hold"],
    ),
]


class CosineSchedule(Section):
    """Warm-up from 0, then half a cosine down to the floor at the last update."""

    name: Literal["cosine"] = "cosine"
    warmup_updates: int = Field(default=0, ge=0, examples=[1000])
    """Updates during which the learning rate rises linearly from 0 to its peak."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, examples=[0.1])
    """Learning rate at the last update as a share of the peak."""
    on_extend: OnExtend = "rescale"


class LinearSchedule(Section):
    """Warm-up from 0, then a straight line down to the floor at the last update."""

    name: Literal["linear"] = "linear"
    warmup_updates: int = Field(default=0, ge=0, examples=[1000])
    """Updates during which the learning rate rises linearly from 0 to its peak."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, examples=[0.0])
    """Learning rate at the last update as a share of the peak."""
    on_extend: OnExtend = "rescale"


class ConstantSchedule(Section):
    """Warm-up from 0, then the peak for the rest of the run."""

    name: Literal["constant"] = "constant"
    warmup_updates: int = Field(default=0, ge=0, examples=[1000])
    """Updates during which the learning rate rises linearly from 0 to its peak."""
    min_lr_ratio: ClassVar[float] = 1.0


class WsdSchedule(Section):
    """WSD, warm-up, stable, decay: warm-up from 0, the peak, then down to the floor at the end.
    The stable phase does not depend on the length of the run, so that one stable run serves
    several budgets, each by a branch that decays."""

    name: Literal["wsd"] = "wsd"
    warmup_updates: int = Field(default=0, ge=0, examples=[1000])
    """Updates during which the learning rate rises linearly from 0 to its peak."""
    decay_updates: int = Field(ge=0, examples=[2000])
    """Updates of the decay, the last ones of the run; 0 = a stable run to branch from."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = Field(default="1-sqrt", examples=["linear"])
    """Form of the decay, in its progress p from 0 to 1: 1 - p, half a cosine, or 1 - sqrt(p), which
    falls steeply first."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, examples=[0.1])
    """Learning rate at the end of the decay as a share of the peak."""
    on_extend: OnExtend = "rescale"


class CosineRestartsSchedule(Section):
    """ReLoRA's jagged cosine: one cosine over the run, with a short warm-up in every cycle."""

    name: Literal["cosine_restarts"] = "cosine_restarts"
    warmup_updates: int = Field(default=0, ge=0, examples=[500])
    """Updates during which the learning rate rises linearly from 0 to its peak."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, examples=[0.1])
    """Learning rate at the last update as a share of the peak."""
    cycle_updates: int = Field(ge=1, examples=[1000])
    """Length of a cycle; it must divide train.updates."""
    restart_warmup_updates: int = Field(default=100, ge=1, examples=[100])
    """Updates at the start of every later cycle that rise from 0 to the cosine."""
    adjust_updates: int = Field(default=0, ge=0, examples=[0])
    """Shifts the cycles to come this many updates earlier (for a run that goes on from another)."""


ScheduleConfig = Annotated[
    CosineSchedule | LinearSchedule | ConstantSchedule | WsdSchedule | CosineRestartsSchedule,
    Field(discriminator="name"),
]
