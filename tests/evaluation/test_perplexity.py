"""Token-weighted loss and the published biased figure, computed by hand on known losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megalr.evaluation.perplexity import evaluate
from megalr.run.metrics_reader import perplexity_of
from tests.ranks import run_distributed


class _KnownLoss(nn.Module):
    """Every target costs the value of its label divided by 10."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return (labels[labels != -100].float() / 10).sum()


def _batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    by_rank = [
        [[[10, 20, -100]], [[30, -100, -100]]],
        [[[50, 50, 50]], [[-100, -100, -100]]],  # the second only fills up
    ]
    return [(torch.zeros(1, 3), torch.tensor(labels)) for labels in by_rank[rank]]


def _evaluate() -> tuple[float, float, float, int, bool]:
    import torch.distributed as dist

    model = _KnownLoss().train()
    result = evaluate(model, _batches(dist.get_rank()), torch.device("cpu"))
    return (
        result.loss,
        result.perplexity,
        result.perplexity_published,
        result.tokens,
        model.training,
    )


def test_loss_is_weighted_by_tokens_over_all_ranks_and_published_figure_is_biased() -> None:
    first, second = run_distributed(_evaluate, 2)
    assert first == second
    loss, perplexity, published, tokens, training = first
    assert tokens == 6
    assert loss == pytest.approx((1 + 2 + 3 + 5 + 5 + 5) / 6)
    assert perplexity == pytest.approx(math.exp(loss))
    # Rank 0: batches of mean 1.5 and 3, divided by 2 + 1; rank 1: one batch of mean 5 by 1 + 1.
    assert published == pytest.approx(math.exp(((1.5 + 3) / 3 + 5 / 2) / 2))
    assert training


def test_perplexity_of_a_diverged_run_is_infinite_not_an_error() -> None:
    assert perplexity_of(1e4) == math.inf
