"""A rank's shard of a tensor under tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Range = tuple[int, int]
"""``(start, stop)``, half-open."""


@dataclass(frozen=True)
class TensorShard:
    """One rank's part of a tensor: some rows of each stacked matrix, some columns, or both.

    A stack (q, k, v) is sharded matrix by matrix, so a rank's rows are several ranges of the whole,
    which the local tensor stores one after the other. Values at positions of a sharded matrix
    (SLTrain) are sharded irregularly: the shard lists their indices.

    Attributes:
        full_shape: shape of the whole tensor, padding included.
        rows: ranges of dimension 0 in the local tensor, in its order; None: all rows.
        columns: range of dimension 1; None: all columns.
        indices: int64 indices of dimension 0, instead of ``rows``.
    """

    full_shape: tuple[int, ...]
    rows: tuple[Range, ...] | None = None
    columns: Range | None = None
    indices: Tensor | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        shape = list(self.full_shape)
        if self.rows is not None:
            shape[0] = sum(stop - start for start, stop in self.rows)
        if self.indices is not None:
            shape[0] = len(self.indices)
        if self.columns is not None:
            shape[1] = self.columns[1] - self.columns[0]
        return tuple(shape)

    @property
    def dimension(self) -> int | None:
        """The one dimension that is cut into equal ranges; None: entries are chosen, or two are."""
        if self.indices is not None or (self.rows is None) == (self.columns is None):
            return None
        return 0 if self.columns is None else 1

    def take(self, full: Tensor) -> Tensor:
        """This rank's shard of ``full``, a new tensor of ``local_shape``.

        Raises:
            ValueError: ``full`` does not have ``full_shape``.
        """
        return torch.cat([full[key] for key in self._keys(full)])

    @torch.no_grad()
    def put(self, full: Tensor, local: Tensor) -> None:
        """Copy the shard ``local`` to its place in ``full``; the inverse of :meth:`take`."""
        start = 0
        for key in self._keys(full):
            count = full[key].shape[0]
            full[key] = local[start : start + count].to(full)
            start += count

    def _keys(self, full: Tensor) -> list[Any]:
        """Indices of the whole tensor whose results, concatenated in dimension 0, are the shard."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"the whole tensor has shape {self.full_shape}, not {full.shape}")
        rows: list[Any] = [slice(None)]
        if self.rows is not None:
            rows = [slice(start, stop) for start, stop in self.rows]
        if self.indices is not None:
            rows = [self.indices.to(full.device)]
        if self.columns is None:
            return rows
        return [(row, slice(*self.columns)) for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain values and at most one tensor, for files without pickled classes."""
        return {
            "full_shape": list(self.full_shape),
            "rows": None if self.rows is None else [list(pair) for pair in self.rows],
            "columns": None if self.columns is None else list(self.columns),
            "indices": self.indices,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TensorShard:
        """The inverse of :meth:`to_dict`."""
        rows, columns = values["rows"], values["columns"]
        return cls(
            tuple(values["full_shape"]),
            None if rows is None else tuple((start, stop) for start, stop in rows),
            None if columns is None else (columns[0], columns[1]),
            values["indices"],
        )


def shard_range(size: int, rank: int, ranks: int) -> Range:
    """``(start, stop)`` of ``rank`` where ``ranks``, which divide ``size``, get equal ranges."""
    length = size // ranks
    return rank * length, (rank + 1) * length


def stack_ranges(sizes: Sequence[int], rank: int, ranks: int) -> tuple[Range, ...]:
    """The ranges of ``rank`` in a stack of matrices with ``sizes`` rows, each split equally."""
    ranges, start = [], 0
    for size in sizes:
        low, high = shard_range(size, rank, ranks)
        ranges.append((start + low, start + high))
        start += size
    return tuple(ranges)


def set_shard(parameter: nn.Parameter, shard: TensorShard | None) -> None:
    """Record on a parameter which part of the whole it is; None: it is whole on every rank.

    A sharded parameter also gets Megatron's mark ``tensor_model_parallel``, by which the engine
    counts its gradient norm on every tensor-parallel rank, that of a replicated one only once.
    """
    if shard is not None:
        parameter.shard = shard  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> TensorShard | None:
    """The shard recorded by :func:`set_shard`; None for a parameter that is whole on every rank."""
    return getattr(parameter, "shard", None)
