"""``health.*``: what a run does about bad updates and stalls."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megalr.config.base import Section


class HealthConfig(Section):
    """Skipped updates, spikes of the loss, rollbacks, and the watchdog."""

    max_skipped: int = Field(default=10, ge=1, examples=[10])
    """After this many skipped updates in a row the run returns to its newest checkpoint and drops
    the batches since (updates). An update is skipped, always and on all ranks, when its loss or
    gradient is not finite."""
    max_rollbacks: int = Field(default=3, ge=0, examples=[3])
    """Times that a run may go back to a checkpoint; one more ends it with an error."""
    spike_threshold: float | None = Field(default=6.0, gt=0, examples=[6.0])
    """A loss (or gradient norm) is a spike when it is more than this many standard deviations above
    the mean of the last spike_window updates; null = spikes are not looked for."""
    spike_window: int = Field(default=128, ge=4, examples=[128])
    """Updates over which that mean and deviation are taken; at least half of them must be there."""
    spike_action: Literal["log", "skip", "reset", "rollback"] = Field(
        default="log", examples=["skip"]
    )
    """What a spike does. log: a line in the metrics. skip: the update is not made (judged by the
    loss alone) and counts for max_skipped. reset: all moments of the optimizer are reset.
    rollback: as max_skipped does. All but log make the host wait for the device in every update."""
    stall_seconds: float = Field(default=1200.0, ge=0, examples=[1200])
    """The run ends, with the stacks of all ranks in the folder stacks, when no update, evaluation
    batch or save makes progress for so long; 0 = never (seconds)."""
