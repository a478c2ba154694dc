"""Runs of several ranks beside one rank."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import grids
import pytest

from megalr.errors import UserError
from tests.synthetic import write_dataset

ROW = {
    "case": "1b_low_rank",
    "preset": "llama_1b",
    "method": {"name": "low_rank", "rank": 512, "alpha": 32.0},
    "precision": "bf16",
    "stage": 1,
    "micro_batch": 64,
    "accumulation": 1,
    "gpus": 4,
    "tensor": 2,
    "tokens_per_second": 300_000,
    "peak_memory_gib": 20.0,
    "losses": [10.0, 9.5, 9.0],
}


def test_the_largest_difference_is_over_updates_that_both_made(tmp_path: Path) -> None:
    one = {**ROW, "gpus": 1, "tensor": 1, "accumulation": 2, "losses": [10.0, 9.50025, 9.0, 8.5]}
    (tmp_path / "one.json").write_text(json.dumps([one]))
    (tmp_path / "grid.json").write_text(json.dumps([ROW]))
    row = grids.compare(tmp_path / "one.json", [tmp_path / "grid.json"]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:8]] == [
        "4",
        "2",
        "1",
        "3",
        "0.00025",
        "300,000",
    ]


def test_a_run_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([{**ROW, "gpus": 1, "tensor": 1}]))
    (tmp_path / "grid.json").write_text(json.dumps([ROW]))
    with pytest.raises(UserError, match="1b_low_rank has no run of the same batch"):
        grids.compare(tmp_path / "one.json", [tmp_path / "grid.json"])


@pytest.mark.long
def test_a_run_goes_on_in_other_grids_with_the_same_losses(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", documents=40)
    grids.resume(
        Namespace(
            gpus=2,
            preset="llama_9m",
            rank=16,
            sequence_length=32,
            precision="fp32",
            data=data,
            work=tmp_path,
            output=tmp_path,
        )
    )
    losses = json.loads((tmp_path / "grid_resume_2gpu.json").read_text())["losses"]
    unbroken = losses.pop("TP 2 x DP 1")
    assert len(losses) == 2 and len(unbroken) == grids.UPDATES
    for resumed in losses.values():
        assert resumed == pytest.approx({str(u): unbroken[str(u)] for u in (5, 6)}, abs=1e-5)
