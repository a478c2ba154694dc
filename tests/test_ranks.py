"""The helper that runs functions on several ranks reports what every rank did."""

from __future__ import annotations

import pytest

from tests.ranks import RankFailed, run_distributed


def _sum_of_ranks(offset: int) -> int:
    import torch
    import torch.distributed as dist

    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return int(value)


def _fail_on_rank_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise RuntimeError("planted")
    dist.barrier()


def test_every_rank_returns_and_one_failing_rank_is_named() -> None:
    assert run_distributed(_sum_of_ranks, 2, 10) == [21, 21]
    assert run_distributed(_sum_of_ranks, 2, 20) == [41, 41]
    with pytest.raises(RankFailed, match=r"(?s)rank 1.*planted"):
        run_distributed(_fail_on_rank_one, 2)
    assert run_distributed(_sum_of_ranks, 2, 0) == [1, 1]
