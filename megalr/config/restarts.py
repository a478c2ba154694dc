"""``restarts.*``: weight refactorization and momentum reset, when and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megalr.config.base import AsTuple, Section

Moment = Literal["first", "second"]

_OF_RESETS = (
    "reset_every",
    "reset_scope",
    "reset_moments",
    "reset_counter",
    "lr_recovery",
    "gradient_norm_spike",
    "compat",
)
"""Keys that act through moments that are set to zero."""


class RestartsConfig(Section):
    """Restarts of a run: refactorization of the factors, reset of the optimizer's moments, or both.

    Independent of the method; without any of the periods and thresholds below there are none.
    """

    every: int | None = Field(default=None, ge=1, examples=[200])
    """Updates between two restarts, for refactorization and reset alike; null = none. Shorthand
    for refactorize_every and reset_every, which go before it."""
    refactorize_every: int | None = Field(default=None, ge=1, examples=[200])
    """Updates between two refactorizations: factors B, A are replaced by the balanced factors of
    the same product. null = as every. Needs a method with factors."""
    reset_every: int | None = Field(default=None, ge=1, examples=[200])
    """Updates between two momentum resets; null = as every. Works with every method."""
    reset: Literal["zero", "transport"] = Field(default="zero", examples=["transport"])
    """What restarts do with the optimizer's moments. zero: they are set to zero. transport: those
    of the factors are carried through every refactorization, into the coordinates of the new
    factors, and nothing is zeroed; AdamW, Muon (fraction 1), NorMuon and Spectron only, and
    without the other keys of resets."""
    phase: int = Field(default=0, ge=0, examples=[100])
    """Restarts come after updates phase, phase + period, phase + 2 period, ...; smaller than every
    period (updates)."""
    start_after: int = Field(default=0, ge=0, examples=[1000])
    """No restart before more than this many updates are done (updates)."""
    stop_before: int = Field(default=0, ge=0, examples=[1000])
    """No restart in this many last updates of the run (updates)."""
    reset_scope: Literal["all", "layers", "factors"] = Field(default="all", examples=["factors"])
    """Parameters whose moments are reset: all; layers, all but embedding, positions and
    head; or only the factors of factorized matrices."""
    reset_moments: Annotated[tuple[Moment, ...], AsTuple] = Field(
        default=("first", "second"), min_length=1, examples=[["first", "second"]]
    )
    """Moments that are set to zero: the average of gradients (first), of their squares (second)."""
    reset_counter: Literal["zero", "one", "keep"] = Field(default="zero", examples=["zero"])
    """What a reset makes of the optimizer's step counter, which bias correction uses: zero restarts
    it (as a new optimizer does), one is Stable-SPAM's choice, keep is SPAM's and ReLoRA's."""
    lr_recovery: Literal["none", "linear", "cosine"] = Field(default="none", examples=["linear"])
    """How the learning rate comes back after a reset: at once, or rising to the schedule's value
    along a line or half a cosine."""
    recovery_updates: int = Field(default=10, ge=1, examples=[10])
    """Updates below the scheduled learning rate after a reset; only with lr_recovery."""
    verify: bool = Field(default=False, examples=[True])
    """After every refactorization check on all ranks that weights are bitwise equal and are the
    rounded masters."""
    compat: Literal["none", "published"] = Field(default="none", examples=["published"])
    """published: the learning rate of the published code after restarts, with its off-by-one:
    recovery_updates is its recovery_steps, and where the period does not divide the run there is
    no recovery. Resets everything; needs every and nothing that contradicts it."""
    imbalance_threshold: float | None = Field(default=None, gt=0, lt=1, examples=[0.5])
    """Also restart (refactorize and reset) when for some matrix ||B'B - AA'|| is more than this
    share of ||B'B|| + ||AA'||; null = off."""
    imbalance_every: int = Field(default=20, ge=1, examples=[20])
    """Updates between two measurements of the imbalance; only with imbalance_threshold."""
    gradient_norm_spike: float | None = Field(default=None, gt=1, examples=[4.0])
    """Also reset when the gradient norm is more than this many times its median over the last
    spike_window updates; null = off."""
    spike_window: int = Field(default=50, ge=4, examples=[50])
    """Updates over which the median of the gradient norm is taken, and the least distance of two
    restarts that gradient_norm_spike triggers; only with gradient_norm_spike."""

    @property
    def refactorize_period(self) -> int | None:
        """Updates between refactorizations; None without."""
        return self.every if self.refactorize_every is None else self.refactorize_every

    @property
    def reset_period(self) -> int | None:
        """Updates between resets; None without."""
        if self.reset == "transport":
            return None
        return self.every if self.reset_every is None else self.reset_every

    @property
    def refactorizes(self) -> bool:
        """Whether a refactorization can happen in this run."""
        return self.refactorize_period is not None or self.imbalance_threshold is not None

    @property
    def resets(self) -> bool:
        """Whether a momentum reset can happen in this run."""
        if self.reset == "transport":
            return False
        triggers = (self.imbalance_threshold, self.gradient_norm_spike)
        return self.reset_period is not None or any(t is not None for t in triggers)

    @property
    def transports(self) -> bool:
        """Whether refactorizations carry the moments of the factors along."""
        return self.reset == "transport"

    @property
    def active(self) -> bool:
        """Whether anything of this section can happen."""
        return self.refactorizes or self.resets

    @model_validator(mode="after")
    def _check(self) -> RestartsConfig:
        periods = [p for p in (self.refactorize_period, self.reset_period) if p is not None]
        if periods and self.phase >= min(periods):
            raise ValueError(
                f"phase {self.phase} must be smaller than the period {min(periods)}: take the "
                "remainder of the division"
            )
        if len(set(self.reset_moments)) != len(self.reset_moments):
            raise ValueError("reset_moments must not name a moment twice")
        if self.transports:
            self._check_transport()
        if self.lr_recovery != "none" and not self.resets:
            raise ValueError("lr_recovery needs resets: set every or reset_every")
        if self.compat == "published":
            self._check_published()
        return self

    def _check_transport(self) -> None:
        if not self.refactorizes:
            raise ValueError(
                "reset transport carries moments through refactorizations, and there are none: set "
                "every, refactorize_every or imbalance_threshold"
            )
        wrong = [k for k in _OF_RESETS if getattr(self, k) != type(self).model_fields[k].default]
        if wrong:
            raise ValueError(
                f"reset transport zeroes nothing, so {', '.join(wrong)} cannot act: leave that out "
                "or use reset zero"
            )

    def _check_published(self) -> None:
        fixed = {
            "phase": 0,
            "start_after": 0,
            "stop_before": 0,
            "reset_scope": "all",
            "reset_moments": ("first", "second"),
            "reset_counter": "zero",
            "lr_recovery": "none",
            "imbalance_threshold": None,
            "gradient_norm_spike": None,
        }
        wrong = [key for key, value in fixed.items() if getattr(self, key) != value]
        if self.reset_period is None:
            raise ValueError("compat published needs a period: set every or reset_every")
        if wrong:
            raise ValueError(
                f"compat published fixes {', '.join(wrong)}: leave that out or use compat none"
            )
