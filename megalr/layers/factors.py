"""How layers describe their matrices to code that works on matrices.

Projections that read the same input (q, k, v; gate, up) are stored stacked by rows in one
parameter, so that they run as one GEMM and count as one tensor for the engine. The logical
matrices keep their identity through the descriptions here: refactorization, matrix optimizers,
export and checkpoints see ``layers.3.attention.q``, not the stack.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class LinearShape:
    """Sizes of the matrices of one group: they share the input of ``in_features`` numbers.

    Attributes:
        names: logical name of each matrix, e.g. ``("layers.0.attention.q", ...)``.
        in_features: columns as stored, padding included.
        out_features: rows as stored of each matrix, padding included.
        in_used: columns that carry the model; those beyond are zero and stay zero.
        out_used: rows that carry the model, of each matrix.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    in_used: int
    out_used: tuple[int, ...]

    def row_ranges(self) -> list[tuple[int, int]]:
        """``(start, stop)`` rows of each matrix in the stack, padding included."""
        ranges, start = [], 0
        for rows in self.out_features:
            ranges.append((start, start + rows))
            start += rows
        return ranges


@dataclass(frozen=True)
class FactorPair:
    """One factorized matrix ``W = scale * B @ A``.

    Attributes:
        name: logical name of W.
        b: parameter whose rows ``b_rows`` are B (m x r).
        a: parameter whose rows ``a_rows`` are A (r x n).
        scale: alpha / r; it is not part of the factors.
    """

    name: str
    b: nn.Parameter
    b_rows: tuple[int, int]
    a: nn.Parameter
    a_rows: tuple[int, int]
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.a_rows[1] - self.a_rows[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of W as stored, padding included."""
        columns = getattr(self.a, "ds_shape", self.a.shape)[1]  # ZeRO-3 empties .shape
        return self.b_rows[1] - self.b_rows[0], columns


def set_row_blocks(parameter: nn.Parameter, names: tuple[str, ...], rows: list) -> None:
    """Note on a stacked parameter which rows belong to which logical matrix.

    Optimizers read it as ``parameter.row_blocks``: a tuple of ``(name, start, stop)``.
    """
    parameter.row_blocks = tuple(  # type: ignore[attr-defined]
        (name, start, stop) for name, (start, stop) in zip(names, rows, strict=True)
    )


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A random generator that depends on the run's seed and a tensor's name only.

    So a weight does not depend on the order of construction, on other layers, or on how the
    model is cut over ranks. CPU and CUDA generators give different numbers for one seed.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
