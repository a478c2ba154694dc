"""What the benchmark says of a run is the median over its intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import throughput

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _step(update: int, rate: float, mfu: float | str) -> dict[str, object]:
    return {
        "event": "step",
        "update": update,
        "tokens_per_second": rate,
        "step_seconds": 100 / rate,
        "data_seconds": 0.0,
        "mfu": mfu,
        "peak_memory_gib": 1.5,
        "loss": 10.0,
    }


@pytest.mark.parametrize(("mfus", "expected"), [([0.3, 0.5, 0.1], 0.3), (["n/a"] * 3, "n/a")])
def test_numbers_are_medians_of_the_intervals_after_the_third(
    mfus: list[float | str], expected: float | str, tmp_path: Path
) -> None:
    warm = [_step(update, 1.0, 0.9) for update in (1, 2, 3)]
    steps = [_step(4 + i, rate, mfus[i]) for i, rate in enumerate((200.0, 400.0, 100.0))]
    start = {"event": "start", "startup_seconds": 2.0, "versions": {}}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(event) + "\n" for event in (start, *warm, *steps)))
    found = throughput.summary("60m_low_rank", throughput.CASES["60m_low_rank"], metrics, 1, 0.0)
    assert found["mfu"] == expected
    assert found["tokens_per_second"] == 200
    assert found["tokens_per_second_range"] == [100, 400]
    assert found["update_seconds"] == 0.5
