"""Cross entropy of logits whose columns lie on several ranks (vocabulary parallelism)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megalr.kernels.loss import IGNORE
from megalr.tensor_parallel.collectives import all_reduce


class ParallelLoss:
    """The kernel of the loss where each rank has the logits of V/p entries.

    Three numbers a token travel: the largest logit, then the sum of exponentials together with the
    target's logit. The logits stay where they are.

    Args:
        group: the ranks.
        start: the vocabulary's entry that this rank's first column stands for.
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
        """Summed loss of a chunk, the same on all ranks; ``logits`` are replaced by its gradient.

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
    """``(T,)`` float32: the largest of the first ``used`` logits here, -inf if there are none."""
    if used == 0:
        return torch.full((logits.shape[0],), float("-inf"), device=logits.device)
    return logits[:, :used].float().amax(dim=-1)


def sums_and_targets(
    logits: torch.Tensor, place: torch.Tensor, largest: torch.Tensor, used: int
) -> torch.Tensor:
    """``(2, T)`` float32: sum of ``exp(z - largest)`` here, and the target's ``z - largest``.

    ``place (T,)`` is the target's column; where it is not one of this rank's, the second is 0.
    """
    z = logits[:, :used].float() - largest.unsqueeze(1)
    here = (place >= 0) & (place < used)
    target = logits.gather(1, torch.where(here, place, 0).unsqueeze(1)).squeeze(1)
    target = torch.where(here, target.float() - largest, 0.0)
    return torch.stack((z.exp().sum(dim=-1), target))


def nll_and_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    place: torch.Tensor,
    largest: torch.Tensor,
    sums: torch.Tensor,
    used: int,
) -> torch.Tensor:
    """The summed loss; ``logits`` become ``softmax - onehot``, zero in padding and without target.

    ``sums (2, T)`` is what :func:`sums_and_targets` gives, summed over the ranks.
    """
    kept = labels != IGNORE
    column = torch.arange(logits.shape[1], device=logits.device)
    z = logits.float() - largest.unsqueeze(1)
    gradient = torch.exp(z) / sums[0].unsqueeze(1) - (column == place.unsqueeze(1)).float()
    gradient = torch.where(kept.unsqueeze(1) & (column < used), gradient, 0.0)
    logits.copy_(gradient)
    return torch.where(kept, sums[0].log() - sums[1], 0.0).sum()
