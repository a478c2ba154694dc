"""Which weights of a decoder are sharded over the tensor-parallel ranks, and where sums are needed.

Two layouts, the values of ``parallel.layout`` (docs/parallelism.md has the algebra):

* ``column_row``: matrices that read the residual stream are column-parallel, those that write it
  row-parallel (Megatron-LM, arXiv 1909.08053 §3); the residual stream is whole on every rank. Of a
  factorized W = BA only one factor is sharded, and the ranks sum the r numbers between the factors.
* ``bottleneck``: both factors of every matrix are sharded, the residual stream is sharded along the
  hidden dimension, and again only the r numbers between the factors are summed, in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalr.sharding.tensor_shard import Range, shard_range
from megalr.tensor_parallel.collectives import copy, gather, reduce, scatter
from megalr.tensor_parallel.mesh import ONE_RANK, Group, Mesh

LAYOUTS = ("column_row", "bottleneck")


@dataclass(frozen=True)
class ShardSpec:
    """How the matrices ``W (m, n)`` of one group of linear layers are sharded.

    Attributes:
        mesh: the ranks.
        inputs: the input is sharded along its last dimension, so W by columns (A, if factorized).
        outputs: the outputs are sharded along their last dimension, so W by rows (B).
    """

    mesh: Mesh = ONE_RANK
    inputs: bool = False
    outputs: bool = False

    @property
    def input_group(self) -> Group:
        """The ranks over which products with the input are partial sums; None if they are whole."""
        return self.mesh.tensor_group if self.inputs else None

    @property
    def output_group(self) -> Group:
        """The ranks over which gradients of the input are partial sums; None if they are whole."""
        return self.mesh.tensor_group if self.outputs else None

    def columns(self, size: int) -> Range:
        """``(start, stop)`` of this rank's columns of W, out of ``size``."""
        return self._shard(size) if self.inputs else (0, size)

    def rows(self, size: int) -> Range:
        """``(start, stop)`` of this rank's rows of W, out of ``size``."""
        return self._shard(size) if self.outputs else (0, size)

    def _shard(self, size: int) -> Range:
        return shard_range(size, self.mesh.tensor_rank, self.mesh.tensor_size)


REPLICATED = ShardSpec()
"""Every rank holds the whole matrices."""


@dataclass(frozen=True)
class Plan:
    """The layout of a whole decoder on a mesh; the default is no tensor parallelism."""

    mesh: Mesh = ONE_RANK
    layout: str = "column_row"

    @property
    def parallel(self) -> bool:
        """Whether anything is sharded."""
        return self.mesh.tensor_size > 1

    @property
    def sharded_residual(self) -> bool:
        """Whether the residual stream is sharded along the hidden dimension."""
        return self.parallel and self.layout == "bottleneck"

    @property
    def group(self) -> Group:
        """The tensor-parallel group."""
        return self.mesh.tensor_group

    def column_parallel(self) -> ShardSpec:
        """Sharding of the matrices that read the residual stream: q, k, v; gate, up."""
        return ShardSpec(self.mesh, inputs=self.sharded_residual, outputs=self.parallel)

    def row_parallel(self) -> ShardSpec:
        """Sharding of the matrices that write the residual stream: o; down."""
        return ShardSpec(self.mesh, inputs=self.parallel, outputs=self.sharded_residual)

    def start_residual(self, x: torch.Tensor) -> torch.Tensor:
        """Partial sums ``(..., h)`` of the embedding to the residual stream, whole or sharded."""
        return scatter(x, self.group) if self.sharded_residual else reduce(x, self.group)

    def end_residual(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream to ``(..., h)`` for the head, which returns partial gradients."""
        return gather(x, self.group) if self.sharded_residual else copy(x, self.group)


SINGLE = Plan()
"""No tensor parallelism."""
