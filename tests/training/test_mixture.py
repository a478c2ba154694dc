"""A mixture of data sets is drawn by its weights and reported by source."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_distributed
from tests.synthetic import write_dataset
from tests.training.runs import events, run, settings, zero


def test_samples_by_source_are_logged_in_the_proportion_of_the_weights(
    data: Path, tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", documents=60, seed=3)
    mixture = [{"path": str(data), "weight": 0.75}, {"path": str(other), "weight": 0.25}]
    folder = tmp_path / "run"
    values = settings(folder, data, data={"train": mixture}, log={"every": 5})
    run_distributed(run, 2, values, zero(1))
    counts = [event["samples_by_source"] for event in events(folder, "step")]
    assert [sum(pair) for pair in counts] == [60, 60]  # 5 updates of 12 sequences
    for first, second in counts:
        assert abs(first - 45) <= 1 and abs(second - 15) <= 1
    # Both folders hold documents out, so both are evaluated on: more than either alone.
    tokens = events(folder, "eval")[-1]["tokens"]
    alone = tmp_path / "alone"
    run_distributed(run, 2, settings(alone, data, log={"every": 5}), zero(1))
    assert tokens > events(alone, "eval")[-1]["tokens"]
