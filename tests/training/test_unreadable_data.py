"""Data that one rank cannot read end the run on all ranks with the same line."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megalr.data import TokenDataset
from megalr.errors import AgreedError, UserError
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero

MESSAGE = "part1.bin: was truncated to 4 bytes"


def _run_unreadable(values: dict[str, Any], ds: dict[str, Any], rank: int, reads: int) -> str:
    """A run in which the reads of one rank fail from a number on; the error that ended it."""
    read, count = TokenDataset.read, 0

    def failing(self: TokenDataset, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if dist.get_rank() == rank and count > reads:
            raise UserError(MESSAGE)
        return read(self, *arguments)

    with patch.object(TokenDataset, "read", failing):
        try:
            run(values, ds)
        except AgreedError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("ds, tensor", [(zero(0), 1), (zero(2), 1), (zero(3), 1), (zero(0), 2)])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_ends_with_the_error_of_one(
    ds: dict[str, Any], tensor: int, rank: int, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = settings(
        folder,
        data,
        train={"updates": 30, "precision": "bf16"},
        evaluation={"every": 0},
        checkpoint={"every": 0},
        parallel={"tensor": tensor},
    )
    messages = run_distributed(_run_unreadable, 2, values, ds, rank, 4)
    assert messages == [f"rank {rank}: {MESSAGE}"] * 2
    updates = [event["update"] for event in events(folder, "train")]
    assert len(updates) < 8 and updates == sorted(set(updates))


def test_an_evaluation_that_one_rank_cannot_read_ends_the_run(data: Path, tmp_path: Path) -> None:
    values = settings(
        tmp_path / "run",
        data,
        train={"updates": 4},
        data={"sequence_length": 24, "validation": str(data), "prefetch_updates": 0},
        evaluation={"every": 2, "tokens": 500},
        checkpoint={"every": 0},
    )
    messages = run_distributed(_run_unreadable, 2, values, zero(0), 1, 3)
    assert messages == [f"rank 1: {MESSAGE}"] * 2
