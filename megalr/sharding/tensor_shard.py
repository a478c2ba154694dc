"""What a rank holds of a tensor that tensor parallelism cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Range = tuple[int, int]


@dataclass(frozen=True)
class TensorShard:
    """One rank's part of a tensor: some rows of each stacked matrix, some columns, or both.

    A stacked tensor (q, k, v) is cut matrix by matrix, so a rank's rows are several ranges of the
    whole; the local tensor holds them one after the other. A vector of values that belong to
    positions of a cut matrix (SLTrain) is cut irregularly and lists the indices it holds.

    Attributes:
        full_shape: shape of the whole tensor, padding included.
        rows: ``(start, stop)`` ranges of dimension 0 held here, in the order of the local tensor;
            None: all.
        columns: ``(start, stop)`` of dimension 1 held here; None: all.
        indices: int64 indices of dimension 0 held here, instead of ``rows``.
    """

    full_shape: tuple[int, ...]
    rows: tuple[Range, ...] | None = None
    columns: Range | None = None
    indices: Tensor | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        shape = list(self.full_shape)
        if self.rows is not None:
            shape[0] = sum(stop - start for start, stop in self.rows)
        if self.indices is not None:
            shape[0] = len(self.indices)
        if self.columns is not None:
            shape[1] = self.columns[1] - self.columns[0]
        return tuple(shape)

    def take(self, full: Tensor) -> Tensor:
        """The part of ``full`` (of ``full_shape``) that this rank holds, a new tensor."""
        return torch.cat([full[key] for key in self._keys(full)])

    @torch.no_grad()
    def put(self, full: Tensor, local: Tensor) -> None:
        """Write the part ``local`` into its place in ``full``; the inverse of :meth:`take`."""
        start = 0
        for key in self._keys(full):
            count = full[key].shape[0]
            full[key] = local[start : start + count].to(full)
            start += count

    def _keys(self, full: Tensor) -> list[Any]:
        """Index expressions into the whole tensor; the parts follow one another in dimension 0."""
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
        """Plain values and at most one tensor, for files that hold no classes."""
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


def part_of(size: int, rank: int, parts: int) -> Range:
    """``(start, stop)`` of part ``rank`` of ``size`` numbers cut into ``parts`` equal parts."""
    length = size // parts
    return rank * length, (rank + 1) * length


def shard_rows(sizes: Sequence[int], rank: int, parts: int) -> tuple[Range, ...]:
    """The ranges of a stack of matrices with ``sizes`` rows, each cut into equal parts."""
    ranges, start = [], 0
    for size in sizes:
        low, high = part_of(size, rank, parts)
        ranges.append((start + low, start + high))
        start += size
    return tuple(ranges)


def set_shard(parameter: nn.Parameter, shard: TensorShard | None) -> None:
    """Note on a parameter what part of the whole it is; None: it is whole on every rank.

    A cut parameter also gets DeepSpeed's mark ``tensor_model_parallel``: its gradient norm counts
    on every tensor-parallel rank, that of a replicated one only once (get_grad_norm_direct).
    """
    if shard is not None:
        parameter.shard = shard  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> TensorShard | None:
    """What :func:`set_shard` noted; None for a parameter that is whole on every rank."""
    return getattr(parameter, "shard", None)
