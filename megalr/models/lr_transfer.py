"""Learning rates that hold at every width and rank: ``method.lr_transfer``.

A layer y = s B h, h = A x with B (m, r), A (r, n) and s = alpha / r is trained by Adam, whose
update changes an entry by about the learning rate lr, whatever the gradient. Let the entries of x
be of order 1. A random sum grows with the root of its length; an update is aligned with its input,
and its sum grows with the length. With the Kaiming draws, A of order 1 / sqrt(n) and B of order
1 / sqrt(r), the entries of h and y / s are of order 1, and one update changes

    h by n lr;   y through A by s (1 + sqrt(r/m)) n lr;   y through B by s r lr.

With lr proportional to 1 / n and s fixed the first two are of order 1 at every width and rank, and
the third is r / n of that at most. This is the spectral condition of arXiv 2310.17813 for a product
and agrees with muP (arXiv 2203.03466), where hidden matrices and head have a learning rate
proportional to 1 / n and the head is drawn with a std proportional to 1 / n. The input of
embedding and norms has one entry that is not zero: their learning rates stay. Hence, from a model
of width n0 and rank r0 on:

    learning rates of factors and head x n0/n,   std of the head x n0/n,   alpha x r/r0.

The other solution, s proportional to n / r with B drawn smaller, lets B contribute as much as A at
every rank; it holds less well where r / n changes, at the sizes of the coordinate check
(tests/models/test_lr_transfer.py), and gives the same if r / n does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalr.config.optimizers import LearningRateRatios


@dataclass(frozen=True)
class LrScales:
    """What a model of another width and rank than the base's multiplies.

    Attributes:
        width: n / n0.
        base_rank: r0; None: nothing is transferred.
    """

    width: float = 1.0
    base_rank: int | None = None

    @property
    def learning_rate(self) -> float:
        """Factor of the learning rates of factors and head, and of the std of the head's draw."""
        return 1 / self.width

    def alpha(self, alpha: float, rank: int) -> float:
        """alpha of a matrix of rank ``rank``: alpha / r is the base's."""
        return alpha if self.base_rank is None else alpha * rank / self.base_rank

    def ratios(self, given: LearningRateRatios) -> LearningRateRatios:
        """``optimizer.lr_ratio`` with the factors of the transfer."""
        if self.base_rank is None:
            return given
        changed = {kind: getattr(given, kind) / self.width for kind in ("factors", "head")}
        return given.model_copy(update=changed)

    def comment(self, alpha: float) -> str:
        """One line with the values that follow; empty without a transfer."""
        if self.base_rank is None:
            return ""
        return (
            f"# lr_transfer: alpha / r = {alpha / self.base_rank:g}; x {self.learning_rate:g}: "
            "learning rates of factors and head, std of the head\n"
        )


NO_TRANSFER = LrScales()


def scales_of(method: Any, width: int) -> LrScales:
    """The scales of a method for a model of hidden size ``width``."""
    base = getattr(method, "lr_transfer", None)
    return NO_TRANSFER if base is None else LrScales(width / base.base_width, base.base_rank)
