"""What the benchmark says of a run is the median over its intervals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import throughput

from megalr.config.schema import RunConfig
from megalr.estimate.memory import GIB, estimate_memory

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


def _options(**given: object) -> argparse.Namespace:
    """What ``changed`` reads of the command line."""
    defaults = dict.fromkeys(throughput.OVERRIDES)
    return argparse.Namespace(**{**defaults, "train": {}, "zero": {}, "optimizer": {}, **given})


@pytest.mark.parametrize(
    ("case", "sequence", "rows"),
    [
        ("1b_low_rank", 2048, 8),
        ("1b_full_rank", 8192, 2),
        ("1b_low_rank", 32768, 1),  # twice the tokens: there is no half of a sequence
        ("60m_low_rank", 4096, 8),
    ],
)
def test_a_length_keeps_the_tokens_of_a_micro_batch(case: str, sequence: int, rows: int) -> None:
    arguments = _options(train={"activation_checkpointing": "full"})
    found = throughput.changed(throughput.CASES[case], arguments, sequence)
    assert (found.sequence, found.micro_batch) == (sequence, rows)
    settings = throughput.run_settings(found, Path("run"), Path("data"), gpus=2, updates=10)
    config = RunConfig.model_validate(settings)
    assert config.data.sequence_length == sequence
    assert config.train.micro_batch_size == rows
    assert config.train.global_batch_size == 2 * rows
    assert config.train.activation_checkpointing == "full"


def test_without_a_length_cases_are_as_published_and_options_win() -> None:
    case = throughput.CASES["1b_low_rank"]
    assert throughput.changed(case, _options()) == case
    assert (case.sequence, case.micro_batch) == (256, 64)
    found = throughput.changed(case, _options(micro_batch=3), 2048)
    assert (found.sequence, found.micro_batch) == (2048, 3)


def test_random_documents_are_as_long_as_asked(tmp_path: Path) -> None:
    throughput.random_data(tmp_path, tokens=5000, document=2048)
    (shard,) = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert (shard["documents"], shard["tokens"]) == (2, 4096)


def test_the_estimate_stands_beside_the_measured_peak() -> None:
    """1B at 2,048 tokens, as megalr memory prints it; 10 % too much against a peak that is less."""
    case = throughput.changed(throughput.CASES["1b_low_rank"], _options(), 2048)
    config = throughput.run_settings(case, Path("run"), Path("data"), gpus=1, updates=10)
    run = RunConfig.model_validate(config)
    ds_user = {"zero_optimization": {"stage": 1}}
    peak = estimate_memory(run, ds_user, "test", 1).peak / GIB
    found = {"versions": {"device": "NVIDIA H200"}, "peak_memory_gib": peak / 1.1}
    row = throughput.estimated(case, config, 1, found)
    assert row == {"estimated_memory_gib": round(peak, 2), "estimate_error_percent": 10.0}
