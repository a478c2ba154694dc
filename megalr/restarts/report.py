"""The outcome of one restart, for the log and for ``metrics.jsonl``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megalr.restarts.spectra import SpectrumSummary


@dataclass(frozen=True)
class RestartReport:
    """One restart; every number is the same on all ranks except the seconds.

    Attributes:
        update: updates done before it.
        trigger: ``period``, ``imbalance`` or ``gradient_norm``.
        refactorized: factors were replaced by balanced ones.
        reset: moments were zeroed.
        moments_transported: the factors' moments were carried through the refactorization.
        refactorize_seconds: time of the refactorization, refreshed weights included.
        reset_seconds: time of the reset.
        matrices: factorized matrices that were refactorized.
        matrices_by_qr: of these, too ill-conditioned for the fast path.
        dead_directions: directions whose singular value is zero.
        reseeded_directions: of these, given a new non-zero factor row or column.
        fraction_reset: share of all existing moment elements, over all ranks, that was zeroed;
            0 before the first update, when there are none.
        parameters_reset: which parameters were reset, see :func:`by_pattern`.
        moments_reset: which moments, e.g. ``("first", "second")``.
        skipped_nonfinite: parameters that hold inf or nan; if any, nothing was done.
        imbalance: the measured imbalance where that was the trigger.
        verified: weights of all ranks were compared.
        spectra: singular values and imbalance that the refactorization found, by kind.
    """

    update: int
    trigger: str
    refactorized: bool = False
    reset: bool = False
    moments_transported: bool = False
    refactorize_seconds: float = 0.0
    reset_seconds: float = 0.0
    matrices: int = 0
    matrices_by_qr: int = 0
    dead_directions: int = 0
    reseeded_directions: int = 0
    fraction_reset: float = 0.0
    parameters_reset: str = ""
    moments_reset: tuple[str, ...] = ()
    skipped_nonfinite: tuple[str, ...] = ()
    imbalance: float | None = None
    verified: bool = False
    spectra: Mapping[str, SpectrumSummary] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """The fields of the ``restart`` event; only those that apply."""
        values: dict[str, Any] = {
            "trigger": self.trigger,
            "refactorized": self.refactorized,
            "reset": self.reset,
        }
        if self.refactorized:
            values |= {
                "refactorize_seconds": self.refactorize_seconds,
                "matrices": self.matrices,
                "matrices_by_qr": self.matrices_by_qr,
                "dead_directions": self.dead_directions,
                "reseeded_directions": self.reseeded_directions,
            }
        if self.moments_transported:
            values["moments_transported"] = True
        if self.reset:
            values |= {
                "reset_seconds": self.reset_seconds,
                "fraction_reset": self.fraction_reset,
                "moments_reset": ", ".join(self.moments_reset),
                "parameters_reset": self.parameters_reset,
            }
        if self.imbalance is not None:
            values["imbalance"] = self.imbalance
        if self.verified:
            values["verified"] = True
        if self.spectra:
            values["spectra"] = {kind: asdict(found) for kind, found in self.spectra.items()}
        if self.skipped_nonfinite:
            values["skipped_nonfinite"] = by_pattern(self.skipped_nonfinite)
        return values


def by_pattern(names: Sequence[str]) -> str:
    """``layers.*.attention.qkv.a x24, head.weight``: names with ``*`` for numbers, and how many."""
    counts = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())
