"""DLR: a fixed offset of the factor B, which copies each bottleneck coordinate to several outputs.

Duplicated latent residual (arXiv 2606.28932): ``y = B z + alpha / sqrt(K) z[floor(o / K)]`` for
output o, z = A x or silu(A x), K = ceil(m / r). That is ``(B + E) z`` with E (m, r), which is zero
but for ``E[o, floor(o / K)] = alpha / sqrt(K)``. It has no parameters and follows from the sizes;
whatever uses W or writes it to a file uses B + E, and optimizers see B alone. E is never stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentResidual:
    """E of one matrix, the rows that a rank holds.

    For m = 5 outputs and r = 2, so that K = 3, with v = alpha / sqrt(3)::

        v 0
        v 0
        v 0
        0 v
        0 v

    Attributes:
        copies: K, outputs that get the same coordinate.
        value: alpha / sqrt(K).
        first: number of this rank's first row in the whole matrix.
        used: rows of this rank without padding, which comes after them and has no offset.
    """

    copies: int
    value: float
    first: int
    used: int

    @classmethod
    def of(cls, rows: int, rank: int, alpha: float, held: slice) -> LatentResidual:
        """E of a matrix of ``rows`` outputs, without padding; this rank holds the rows ``held``."""
        copies = math.ceil(rows / rank)
        return cls(copies, alpha / math.sqrt(copies), held.start, held.stop - held.start)

    def add_to(self, b: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        """``b + times E``, in place, for the rows ``b (rows, r)`` of this rank; returns ``b``.

        ``rows`` may leave out the padding. Three slices at most: the end of a run of K rows, whole
        runs, the start of one.
        """
        row, stop = self.first, self.first + self.used
        while row < stop:
            column, inside = divmod(row, self.copies)
            runs = (stop - row) // self.copies if inside == 0 else 0
            count = runs * self.copies or min(self.copies - inside, stop - row)
            part = b[row - self.first : row - self.first + count, column:]
            if runs:  # (K, runs): the diagonals of the squares that the runs make
                part = part.unflatten(0, (runs, self.copies)).diagonal(dim1=0, dim2=2)
            else:
                part = part[:, 0]
            part.add_(times * self.value)
            row += count
        return b
