"""How layers describe their stored matrices to code that works on matrices.

Projections that read the same input (q, k, v; gate, up) are stored stacked by rows in one
parameter, so that they run as one GEMM and are one tensor for the engine. The descriptions here
keep the logical matrices apart: refactorization, matrix optimizers, export and checkpoints see
``layers.3.attention.q``, not the stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from megalr.layers.latent_residual import LatentResidual
from megalr.sharding.tensor_shard import TensorShard, stack_ranges
from megalr.tensor_parallel.plan import REPLICATED, ShardSpec


@dataclass(frozen=True)
class LinearShape:
    """Sizes of the matrices of one group, which share an input of width ``in_features``.

    Attributes:
        names: logical name of each matrix, e.g. ``("layers.0.attention.q", ...)``.
        in_features: columns, padding included.
        out_features: rows of each matrix, padding included.
        in_used: columns without padding; those beyond are zero and stay zero.
        out_used: rows of each matrix without padding.
        spec: how the matrices are sharded; the sizes above are those of whole matrices.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    in_used: int
    out_used: tuple[int, ...]
    spec: ShardSpec = REPLICATED

    @property
    def local_in(self) -> int:
        """Columns on this rank, padding included."""
        start, stop = self.spec.columns(self.in_features)
        return stop - start

    @property
    def local_out(self) -> tuple[int, ...]:
        """Rows of each matrix on this rank, padding included."""
        return tuple(stop - start for start, stop in map(self.spec.rows, self.out_features))

    def subset(self, indices: Sequence[int]) -> LinearShape:
        """The group of some of the matrices alone."""
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            out_features=tuple(self.out_features[index] for index in indices),
            out_used=tuple(self.out_used[index] for index in indices),
        )

    def row_ranges(self) -> list[tuple[int, int]]:
        """``(start, stop)`` rows of each matrix in this rank's stack, padding included."""
        ranges, start = [], 0
        for rows in self.local_out:
            ranges.append((start, start + rows))
            start += rows
        return ranges

    def local_rows(self, index: int) -> slice:
        """Rows of the unpadded matrix ``index`` that this rank holds."""
        start, stop = self.spec.rows(self.out_features[index])
        used = self.out_used[index]
        return slice(min(start, used), min(stop, used))

    def local_columns(self) -> slice:
        """Columns of the unpadded matrices that this rank holds."""
        start, stop = self.spec.columns(self.in_features)
        return slice(min(start, self.in_used), min(stop, self.in_used))

    def shard(self, rows: int | None = None, columns: int | None = None) -> TensorShard | None:
        """This rank's shard of a stack of weights; None if it holds the whole stack.

        The default is the stack of the matrices, ``(sum m_i, n)``.

        Args:
            rows: rows of a stack that is never split by rows (the factors A).
            columns: columns of a stack never split by columns (r, for the factors B); 0 for a
                vector.
        """
        mesh = self.spec.mesh
        split_rows = self.spec.outputs and rows is None
        split_columns = self.spec.inputs and columns is None
        if mesh.tensor_size == 1 or not (split_rows or split_columns):
            return None
        height = sum(self.out_features) if rows is None else rows
        width = self.in_features if columns is None else columns
        return TensorShard(
            (height, width) if width else (height,),
            stack_ranges(self.out_features, mesh.tensor_rank, mesh.tensor_size)
            if split_rows
            else None,
            self.spec.columns(self.in_features) if split_columns else None,
        )


@dataclass(frozen=True)
class FactorPair:
    """One factorized matrix ``W = scale * (B + E) @ A``; E is zero without ``residual``.

    Attributes:
        name: logical name of W.
        b: parameter whose rows ``b_rows`` are B (m x r).
        a: parameter whose rows ``a_rows`` are A (r x n).
        scale: alpha / r; it is not part of the factors.
        columns: n, on this rank, padding included.
        spec: over which ranks B is sharded by rows (``outputs``) and A by columns (``inputs``); the
            parameters and ranges above are those of this rank.
        residual: E, a fixed offset of B.
    """

    name: str
    b: nn.Parameter
    b_rows: tuple[int, int]
    a: nn.Parameter
    a_rows: tuple[int, int]
    scale: float
    columns: int
    spec: ShardSpec = REPLICATED
    residual: LatentResidual | None = None

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.a_rows[1] - self.a_rows[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows of B, columns of A)`` on this rank, padding included."""
        return self.b_rows[1] - self.b_rows[0], self.columns


def set_row_blocks(parameter: nn.Parameter, names: tuple[str, ...], rows: list) -> None:
    """Record on a stacked parameter which rows belong to which logical matrix.

    Optimizers read it as ``parameter.row_blocks``: a tuple of ``(name, start, stop)``.
    """
    parameter.row_blocks = tuple(  # type: ignore[attr-defined]
        (name, start, stop) for name, (start, stop) in zip(names, rows, strict=True)
    )


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A random generator that depends only on the run's seed and a tensor's name.

    A weight thus does not depend on the order of construction, on other layers, or on how the model
    is sharded. CPU and CUDA generators give different numbers for one seed.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
