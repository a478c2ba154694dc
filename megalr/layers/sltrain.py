"""SLTrain: ``W = (alpha/r) B A + S``, S sparse on a fixed random support (arXiv 2406.02214)."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from megalr.errors import UserError
from megalr.layers.factors import LinearShape, named_generator, set_row_blocks
from megalr.layers.linear import FactorizedLinear
from megalr.layers.sparse_product import MAX_ENTRIES, sparse_low_rank
from megalr.sharding.tensor_shard import TensorShard, set_shard
from megalr.tensor_parallel.collectives import copy, reduce


def draw_support(seed: int, name: str, rows: int, columns: int, density: float) -> np.ndarray:
    """``floor(density m n)`` positions of an m x n matrix, without replacement, ascending.

    A position is ``row * columns + column``, int64. The draw depends on the seed and the name
    only: not on device, ranks or padding.
    """
    digest = hashlib.sha256(f"{seed}:{name}.support".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    count = int(density * rows * columns)
    return np.sort(generator.choice(rows * columns, count, replace=False, shuffle=False))


class SLTrainLinear(FactorizedLinear):
    """``y_i = x ((alpha/r) B_i A_i + S_i)^T (+ bias_i)`` for the matrices of one group.

    Parameters: the factors ``a (G r, n)`` and ``b (sum m_i, r)``, and ``values (sum nnz_i,)`` of
    the sparse parts. Buffer: ``support (sum nnz_i,)`` int32, positions in this rank's stack of
    matrices. S is not scaled by alpha/r.

    Under tensor parallelism a rank holds the entries of S in its rows or columns. The sum BA + S is
    applied as one dense matrix, so the ranks sum the n (m) numbers of a dense layer, and in
    addition the gradient of the factor that is not sharded.

    Args:
        shape: sizes of the group.
        rank: r.
        alpha: numerator of the scale.
        density: delta, fraction of the entries of a matrix that are in S, in (0, 1).
        seed: seed of the run, from which the support is drawn.
        bias: adds a dense vector to each output.
        sparse_indices: positions by matrix name, as ``draw_support`` returns them, instead of drawn
            ones.

    Raises:
        UserError: a rank would have 2^31 entries or more, which int32 positions cannot address.
    """

    support: torch.Tensor
    form = "sparse"

    def __init__(
        self,
        shape: LinearShape,
        rank: int,
        alpha: float,
        density: float,
        seed: int,
        bias: bool = False,
        sparse_indices: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(shape, rank, alpha, bias)
        entries = sum(self.sizes) * shape.local_in
        if entries >= MAX_ENTRIES:
            raise UserError(
                f"{', '.join(shape.names)}: method sltrain addresses fewer than 2^31 entries of "
                f"these matrices on a rank, not {entries}: raise parallel.tensor"
            )
        positions: list[np.ndarray] = []  # in this rank's stack
        indices: list[np.ndarray] = []  # among all drawn values
        self.counts: list[int] = []  # entries of each matrix on this rank
        self.drawn: list[int] = []  # and on all ranks
        for index, (name, rows) in enumerate(zip(shape.names, shape.out_used, strict=True)):
            if sparse_indices is not None:
                drawn = sparse_indices[name]
            else:
                drawn = draw_support(seed, name, rows, shape.in_used, density)
            chosen, places = self._local_support(index, drawn)
            positions.append(places)
            indices.append(chosen + sum(self.drawn))
            self.counts.append(len(chosen))
            self.drawn.append(len(drawn))
        support = torch.from_numpy(np.concatenate(positions).astype(np.int32))
        self.register_buffer("support", support.to(self.a.device))
        self.values = nn.Parameter(torch.empty(len(support)))
        ends = np.cumsum([0, *self.counts]).tolist()
        ranges = list(itertools.pairwise(ends))
        set_row_blocks(self.values, tuple(f"{n}.S" for n in shape.names), ranges)
        # Indices of this rank's values among all drawn ones, on the CPU.
        self.local_indices = torch.from_numpy(np.concatenate(indices))
        if shape.spec.mesh.tensor_size > 1:
            set_shard(self.values, TensorShard((sum(self.drawn),), indices=self.local_indices))

    def _local_support(self, index: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which drawn positions of matrix ``index`` are on this rank, and where in the stack."""
        row, column = np.divmod(drawn, self.shape.in_used)
        rows, columns = self.shape.local_rows(index), self.shape.local_columns()
        chosen = np.flatnonzero(
            (row >= rows.start)
            & (row < rows.stop)
            & (column >= columns.start)
            & (column < columns.stop)
        )
        start = self.used_rows(index).start
        places = (row[chosen] - rows.start + start) * self.shape.local_in
        return chosen, places + column[chosen] - columns.start

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x (..., n)`` to the outputs ``(..., m_i)``."""
        # The gradient of a factor that is not sharded is partial on each rank: W is sharded.
        a, b = copy(self.a, self.output_group), copy(self.b, self.input_group)
        x = copy(x, self.output_group)
        y = sparse_low_rank(
            x.reshape(-1, x.shape[-1]), b, a, self.values, self.support, self.sizes, self.scale
        )
        y = reduce(y, self.input_group)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1).split(self.sizes, dim=-1)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """A ~ U(+-1/sqrt(n)), B = 0, values ~ U(+-1/sqrt(n)): W = S at first."""
        self.a.zero_()
        self.b.zero_()
        n, device = self.shape.in_used, self.a.device
        bound = 1 / math.sqrt(n)
        values = torch.empty(sum(self.drawn), device=device)
        for index, name in enumerate(self.shape.names):
            draw = torch.empty(self.rank, n, device=device)
            draw.uniform_(-bound, bound, generator=named_generator(seed, f"{name}.A", device))
            self.used_factors(index)[0].copy_(draw[:, self.shape.local_columns()])
            generator = named_generator(seed, f"{name}.S", device)
            values.split(self.drawn)[index].uniform_(-bound, bound, generator=generator)
        self.values.copy_(values[self.local_indices.to(device)])

    def sparse_weight(self, index: int) -> torch.Tensor:
        """This rank's shard of S_index as a dense float32 matrix, without padding."""
        stack = torch.zeros(sum(self.sizes), self.shape.local_in, device=self.values.device)
        stack.view(-1).index_add_(0, self.support, self.values.detach().float())
        return stack[self.used_rows(index), self.used_columns()]

    def dense_weight(self, index: int) -> torch.Tensor:
        """This rank's shard of ``scale * B A + S``, without padding, float32."""
        return super().dense_weight(index) + self.sparse_weight(index)

    @torch.no_grad()
    def load_dense(self, index: int, weight: torch.Tensor) -> None:
        """Set BA to the best rank-r approximation of ``weight``, S to the rest on its support."""
        super().load_dense(index, weight)
        rest = self.local_part(index, weight).to(self.values) - super().dense_weight(index)
        stack = torch.zeros(sum(self.sizes), self.shape.local_in, device=self.values.device)
        stack[self.used_rows(index), self.used_columns()] = rest.to(stack)
        chosen = slice(sum(self.counts[:index]), sum(self.counts[: index + 1]))
        self.values[chosen] = stack.view(-1)[self.support[chosen].long()].to(self.values)

    @torch.no_grad()
    def load_dense_and_support(self, index: int, weight: torch.Tensor) -> None:
        """As :meth:`load_dense`, with the support moved to the largest entries of the rest.

        For a layer that is not sharded: the number of entries on a rank is fixed at construction.
        """
        FactorizedLinear.load_dense(self, index, weight)
        rest = weight.to(self.values) - FactorizedLinear.dense_weight(self, index)  # (m, n)
        count = self.drawn[index]
        largest = rest.flatten().abs().topk(count).indices.sort().values
        chosen = slice(sum(self.counts[:index]), sum(self.counts[: index + 1]))
        self.values[chosen] = rest.flatten()[largest]
        _, places = self._local_support(index, largest.cpu().numpy())
        self.support[chosen] = torch.from_numpy(places).to(self.support)

    def support_positions(self, index: int) -> np.ndarray:
        """Positions of S_index in the form of ``draw_support``, for a layer that is not sharded."""
        chosen = slice(sum(self.counts[:index]), sum(self.counts[: index + 1]))
        row, column = np.divmod(self.support[chosen].long().cpu().numpy(), self.shape.local_in)
        return (row - self.used_rows(index).start) * self.shape.in_used + column

    def stored_matrix(self, index: int) -> dict[str, torch.Tensor]:
        """The factors, and S as ``values`` at ``positions``; for a layer that is not sharded."""
        values = self.values.detach().split(self.counts)[index].float()
        positions = torch.from_numpy(self.support_positions(index))
        return {**super().stored_matrix(index), "values": values, "positions": positions}

    def weight_count(self) -> int:
        """The factors and the sparse values."""
        return super().weight_count() + sum(self.drawn)
