"""``restarts.*``: what happens to factors and optimizer state every so many updates."""

from __future__ import annotations

from pydantic import Field

from megalr.config.base import Section


class RestartsConfig(Section):
    """Periodic restarts of a run; independent of the method."""

    every: int = Field(default=0, ge=0, examples=[200])
    """Updates between two restarts; 0 = no restarts."""
