"""The table of token embeddings, whole or sharded by vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalr.kernels import half_on_gpu
from megalr.kernels.embedding import lookup
from megalr.layers.factors import named_generator
from megalr.sharding.tensor_shard import TensorShard, set_shard, shard_range
from megalr.tensor_parallel.mesh import Mesh


class Embedding(nn.Module):
    """``x = W[ids]``; W is ``(V, h)``, V the padded vocabulary.

    Under tensor parallelism each rank holds the rows of V/p entries and returns zeros for the
    others (vocabulary parallelism, arXiv 1909.08053 §3): the output is a partial sum over the
    ranks, of which one has a term that is not zero.

    Args:
        vocab_size: entries of the model's vocabulary.
        padded_vocab_size: V; rows from ``vocab_size`` on are zero.
        hidden_size: h.
        mesh: the ranks over which the rows are sharded.

    Attributes:
        fused: compute the gradient by the kernel of kernels.embedding where it applies. It does not
            under tensor parallelism, where the ids of other ranks all map to one row.
    """

    def __init__(
        self, vocab_size: int, padded_vocab_size: int, hidden_size: int, mesh: Mesh
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.parallel = mesh.tensor_size > 1
        self.fused = False
        self.start, self.stop = shard_range(padded_vocab_size, mesh.tensor_rank, mesh.tensor_size)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, hidden_size))
        set_shard(self.weight, vocabulary_shard(padded_vocab_size, hidden_size, mesh))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``(...,)`` int64 to ``(..., h)``: the embeddings, or this rank's term of their sum."""
        if not self.parallel:
            fused = self.fused and half_on_gpu(self.weight)
            return lookup(ids, self.weight) if fused else F.embedding(ids, self.weight)
        elsewhere = (ids < self.start) | (ids >= self.stop)
        x = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight)
        return x.masked_fill(elsewhere.unsqueeze(-1), 0.0)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw W from N(0, std^2); padded rows are zero."""
        init_rows(self.weight, self.vocab_size, seed, "embedding", std, self.start)


def vocabulary_shard(padded_vocab_size: int, hidden_size: int, mesh: Mesh) -> TensorShard | None:
    """This rank's shard of a ``(V, h)`` table split by rows; None on a single rank."""
    if mesh.tensor_size == 1:
        return None
    part = shard_range(padded_vocab_size, mesh.tensor_rank, mesh.tensor_size)
    return TensorShard((padded_vocab_size, hidden_size), rows=(part,))


@torch.no_grad()
def init_rows(
    weight: torch.Tensor, used: int, seed: int, name: str, std: float, start: int = 0
) -> None:
    """Fill the first ``used`` rows of a table from N(0, std^2), zero the rest.

    ``weight`` holds the table's rows from ``start`` on. The whole table is drawn from the generator
    of ``name``, so its values do not depend on how it is sharded.
    """
    weight.zero_()
    generator = named_generator(seed, name, weight.device)
    whole = torch.empty(used, weight.shape[1], device=weight.device)
    whole.normal_(0.0, std, generator=generator)
    mine = whole[start : start + weight.shape[0]]
    weight[: mine.shape[0]].copy_(mine)  # rounds without a copy in between
