"""Restarts that no period asks for: a spike of the gradient norm (and see ``largest_imbalance``).

Whether restarts should come by a clock is an open question of arXiv 2505.22922; these triggers are
off by default.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any


class SpikeDetector:
    """Tells when the gradient norm is more than ``ratio`` times its recent median.

    The median is over the last ``window`` finite norms before the present one, of which at least
    half must be there. After a spike was reported none is for ``window`` updates, so that a lasting
    rise becomes the new median instead of a restart at every update.
    """

    def __init__(self, ratio: float, window: int) -> None:
        self.ratio = ratio
        self.window = window
        self._norms: deque[float] = deque(maxlen=window)
        self._quiet_until = 0

    def observe(self, update: int, norm: float) -> bool:
        """Take note of the norm of an update; True if it is a spike."""
        if not math.isfinite(norm):  # the health check's business
            return False
        enough = len(self._norms) >= self.window // 2
        spike = (
            enough
            and update >= self._quiet_until
            and norm > self.ratio * statistics.median(self._norms)
        )
        self._norms.append(norm)
        if spike:
            self._quiet_until = update + self.window
        return spike

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"norms": list(self._norms), "quiet_until": self._quiet_until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; a shorter window keeps the newest norms."""
        self._norms = deque(state["norms"], maxlen=self.window)
        self._quiet_until = state["quiet_until"]
