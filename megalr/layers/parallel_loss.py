"""Cross entropy of logits whose columns are sharded over ranks (vocabulary parallelism)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megalr.kernels.loss import IGNORE
from megalr.tensor_parallel.collectives import all_reduce


class ParallelLoss:
    """The loss of a chunk where each rank has the logits of V/p entries (arXiv 1909.08053 §3).

    Three numbers per token are reduced over the ranks: the largest logit, then the sum of
    exponentials together with the target's logit. The logits themselves are never gathered.

    Args:
        group: the ranks.
        start: index in the vocabulary of this rank's first column.
    """

    def __init__(self, group: dist.ProcessGroup, start: int) -> None:
        self.group = group
        self.start = start
        self.largest: Callable[..., torch.Tensor] = largest_logit
        self.sums: Callable[..., torch.Tensor] = sums_and_targets
        self.finish: Callable[..., torch.Tensor] = nll_and_gradient_

    def compile(self) -> None:
        """Compile the parts between the collectives."""
        self.largest, self.sums, self.finish = (
            torch.compile(part, dynamic=False) for part in (self.largest, self.sums, self.finish)
        )

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Summed loss of a chunk, float32, the same on all ranks; ``logits`` become its gradient.

        Args:
            logits: ``(T, V/p)``, this rank's columns.
            labels: ``(T,)`` int64, IGNORE where a row has no target.
            vocab_size: entries from here on are padding and take no probability.
        """
        used = min(max(vocab_size - self.start, 0), logits.shape[1])
        largest = all_reduce(self.largest(logits, used), self.group, "max")
        parts = self.sums(logits, labels - self.start, largest, used)
        sums = all_reduce(parts, self.group)
        return self.finish(logits, labels, labels - self.start, largest, sums, used)


def largest_logit(logits: torch.Tensor, used: int) -> torch.Tensor:
    """``(T,)`` float32: largest of this rank's first ``used`` logits, -inf if there are none."""
    if used == 0:
        return torch.full((logits.shape[0],), float("-inf"), device=logits.device)
    return logits[:, :used].float().amax(dim=-1)


def sums_and_targets(
    logits: torch.Tensor, column: torch.Tensor, largest: torch.Tensor, used: int
) -> torch.Tensor:
    """``(2, T)`` float32: this rank's sum of ``exp(z - largest)``, the target's ``z - largest``.

    ``column (T,)`` is the target's column; if it is on another rank, the second number is 0.
    """
    z = logits[:, :used].float() - largest.unsqueeze(1)
    local = (column >= 0) & (column < used)
    target = logits.gather(1, torch.where(local, column, 0).unsqueeze(1)).squeeze(1)
    target = torch.where(local, target.float() - largest, 0.0)
    return torch.stack((z.exp().sum(dim=-1), target))


def nll_and_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target: torch.Tensor,
    largest: torch.Tensor,
    sums: torch.Tensor,
    used: int,
) -> torch.Tensor:
    """The summed loss; ``logits`` become ``softmax - onehot``, zero in padding and without target.

    ``target (T,)`` is the target's column; ``sums (2, T)`` are the results of
    :func:`sums_and_targets`, summed over the ranks.
    """
    kept = labels != IGNORE
    column = torch.arange(logits.shape[1], device=logits.device)
    z = logits.float() - largest.unsqueeze(1)
    gradient = torch.exp(z) / sums[0].unsqueeze(1) - (column == target.unsqueeze(1)).float()
    gradient = torch.where(kept.unsqueeze(1) & (column < used), gradient, 0.0)
    logits.copy_(gradient)
    return torch.where(kept, sums[0].log() - sums[1], 0.0).sum()
