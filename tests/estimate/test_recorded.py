"""Estimates are the recorded peaks of GPUs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import throughput

from megalr.config.schema import RunConfig
from megalr.estimate.memory import GIB, RESERVED, MemoryEstimate, estimate_memory
from tests.training.runs import zero

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def _recorded_run(row: dict[str, Any]) -> RunConfig:
    """The run of a row, as the benchmark builds it."""
    known = {field.name for field in dataclasses.fields(throughput.Case)}
    case = throughput.Case(**{key: value for key, value in row.items() if key in known})
    folder = Path("unused")
    return RunConfig.model_validate(
        throughput.run_settings(case, folder, folder, row["gpus"], updates=100)
    )


RESERVED_BY_USED = (0.97, 1 + RESERVED)
"""Reserved memory by what is used: the allocator keeps pieces that nothing fits into, and matrix
optimizers need room for one matrix at a time, which is not counted."""

ALLOCATED_BY_USED = (0.98, 1.03)
"""The allocator's own count, where no CUDA graph was used: no pieces in it."""


def _reserved_by_a_model_drawn_whole(estimate: MemoryEstimate) -> int:
    """Bytes reserved before the first update where memory is plentiful, as the runs were recorded.

    The model was drawn whole in float32 then. That memory was free by the first update, but in
    pieces into which no activation fits.
    """
    s = estimate.states
    return estimate.fixed - s.moments + estimate.graph + 2 * (s.weights + s.frozen)


def test_recorded_peaks_are_met() -> None:
    """Of rows that list losses: what was reserved where a CUDA graph was used, else allocated.

    Older rows have the allocator's peak while the graph was captured.
    """
    kinds = ("throughput", "lengths", "grids")
    files = [path for kind in kinds for path in sorted(RESULTS.glob(f"{kind}_*gpu.json"))]
    rows = [row for file in files for row in json.loads(file.read_text()) if "losses" in row]
    assert rows, "no recorded peaks in benchmarks/results"
    wrong = []
    for row in rows:
        config = _recorded_run(row)
        estimate = estimate_memory(config, zero(row["stage"]), row["case"], row["gpus"])
        used, (least, most) = estimate.peak / GIB, ALLOCATED_BY_USED
        if config.train.cuda_graphs:
            least, most = RESERVED_BY_USED
            used = max(used, _reserved_by_a_model_drawn_whole(estimate) / GIB)
            if row["restarts"]:
                most = math.inf  # their work space is not counted (docs/memory.md)
        if not least < row["peak_memory_gib"] / used < most:
            wrong.append(f"{row['case']}: {used:.2f}, recorded {row['peak_memory_gib']}")
    assert not wrong, "\n".join(wrong)


def test_a_row_of_the_benchmark_becomes_its_run() -> None:
    method = {"name": "low_rank", "rank": 128, "alpha": 32.0}
    row = {"case": "a case", "preset": "llama_60m", "method": method, "micro_batch": 128}
    row |= {"precision": "paper_bf16", "stage": 0, "accumulation": 2, "gpus": 1, "mfu": 0.3}
    row |= {"train": {"activation_checkpointing": "mlp"}, "optimizer": {"lr": 2e-3}}
    config = _recorded_run({**row, "tensor": 1, "layout": "auto", "losses": []})
    train = config.train
    assert (config.method.name, config.optimizer.lr) == ("low_rank", 2e-3)
    assert (train.precision, train.activation_checkpointing) == ("paper_bf16", "mlp")
    assert (train.micro_batch_size, train.global_batch_size, train.cuda_graphs) == (128, 256, True)
