"""Perplexity on a fixed validation set."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megalr.data.loader import MicroBatch
from megalr.kernels.loss import IGNORE
from megalr.run.metrics_reader import perplexity_of


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        loss: mean negative log likelihood of a target token, over all ranks (nats).
        perplexity: exp(loss).
        perplexity_published: the figure that the published code of these methods reports:
            mean over ranks of (sum of batch means) / (batches + 1), exponentiated. Its loss is too
            low by a factor of n / (n + 1) and depends on the batch shape; it is reported only for
            comparison with printed numbers.
        tokens: targets evaluated.
        eval_seconds: wall-clock time.
    """

    loss: float
    perplexity: float
    perplexity_published: float
    tokens: int
    eval_seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Token-weighted loss of ``model(input_ids, labels)`` over the batches of all ranks.

    With document masks ``model(input_ids, labels, positions)``, as the batches have them.

    Every rank must have the same number of batches (ZeRO 3 gathers weights in each); padding rows
    have no targets and no weight. The order of summation over batches is fixed, so equal weights
    give equal numbers. ``group``: the data-parallel group, whose ranks have different batches;
    None: all ranks.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        tensors = [tensor.to(device, non_blocking=True) for tensor in batch]
        nll = model(*tensors).double()
        count = (tensors[1] != IGNORE).sum()
        has_targets = (count > 0).double()
        totals += torch.stack((nll, count.double(), nll / count.clamp(min=1), has_targets))
    model.train(was_training)
    # The published figure divides on each rank, then averages over ranks.
    biased = totals[2] / (totals[3] + 1)
    summed = torch.stack((totals[0], totals[1], biased))
    world = 1
    if dist.is_initialized():
        world = dist.get_world_size(group)
        dist.all_reduce(summed, group=group)
    nll_sum, tokens, biased_sum = summed.tolist()
    loss = nll_sum / max(1.0, tokens)
    return Evaluation(
        loss=loss,
        perplexity=perplexity_of(loss),
        perplexity_published=perplexity_of(biased_sum / world),
        tokens=int(tokens),
        eval_seconds=time.perf_counter() - started,
    )
