"""What the scaling model is fitted to and compared with: recorded runs, prototypes, the cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalr.config.schema import RunConfig
from megalr.estimate.tensors import plan_of
from megalr.estimate.update_time import Gpu, Job, update_work
from megalr.estimate.work import micro_batch_work
from megalr.models.config import PRESETS
from megalr.tensor_parallel.plan import SINGLE
from scaling.besides import Balancing, Loader

RESULTS = Path(__file__).resolve().parents[1] / "results"
METHODS = ("low_rank", "full_rank", "sltrain")
"""Methods that are predicted."""

KNOWN = (*METHODS, "cola", "lora")
"""Methods that the model of time knows: with AdamW, by torch's products alone."""

ALL_REDUCES = (
    (16384 * 4096 * 2, 0.63e-3),
    (16384 * 3072 * 2, 0.48e-3),
    (16384 * 1024 * 2, 0.18e-3),
)
"""(bytes, seconds) on 4 H200."""

PROTOTYPE_TP = {
    # A prototype measured on 4 H200: blocks of the 7B shape, rank 1024, 8 x 2048 tokens, forward
    # and backward without embedding, head and optimizer; tokens/s scaled to 32 blocks. Its
    # bottleneck layout had messages of 3r + 1 numbers, which made unaligned products slow.
    ("full_rank", 1, "column_row"): 15_000,
    ("full_rank", 2, "column_row"): 26_300,
    ("full_rank", 4, "column_row"): 44_900,
    ("low_rank", 1, "column_row"): 32_000,
    ("low_rank", 2, "column_row"): 43_700,
    ("low_rank", 4, "column_row"): 57_000,
    ("low_rank", 2, "bottleneck"): 36_900,
    ("low_rank", 4, "bottleneck"): 58_100,
}
PROTOTYPE_MODEL = {
    # A prototype without engine on one H200: tokens/s of micro-batches of 128, 64, 64 x 256.
    ("llama_60m", "low_rank"): 1_640_000,
    ("llama_60m", "full_rank"): 1_380_000,
    ("llama_350m", "low_rank"): 337_000,
    ("llama_350m", "full_rank"): 216_300,
    ("llama_1b", "low_rank"): 130_400,
    ("llama_1b", "full_rank"): 69_500,
}
RANKS = {
    "llama_60m": 128,
    "llama_350m": 256,
    "llama_1b": 512,
    "llama_7b": 1024,
    "llama_13b": 1280,
}


@dataclass(frozen=True)
class Measured:
    """A recorded run: what it was and its seconds an update."""

    name: str
    job: Job
    seconds: float


def method_of(preset: str, name: str) -> Any:
    """The settings of a method with the published rank of the model."""
    values: dict[str, Any] = {"name": name}
    if name != "full_rank":
        values |= {"rank": RANKS[preset], "alpha": 32.0}
    if name == "sltrain":
        values["density"] = 0.03
    return run_config(preset, values, 1, 1, 256).method


def run_config(
    preset: str, method: dict[str, Any], micro: int, batch: int, sequence: int, **train: Any
) -> RunConfig:
    """A run's configuration; folders are not opened."""
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"preset": preset},
            "method": method,
            "optimizer": {"lr": 1e-3},
            "data": {"train": "unused", "sequence_length": sequence},
            "train": {
                "updates": 1,
                "global_batch_size": batch,
                "micro_batch_size": micro,
                "compile": True,
                **train,
            },
        }
    )


def recorded(folder: Path = RESULTS) -> list[Measured]:
    """Every recorded run of a kind that is predicted, on any number of GPUs."""
    paths = sorted(folder.glob("throughput_*.json"))
    return [run for path in paths for run in recorded_rows(json.loads(path.read_text()))]


def recorded_rows(rows: list[dict[str, Any]]) -> list[Measured]:
    """The runs of a kind that is predicted among rows of benchmarks/throughput.py."""
    runs = []
    for row in filter(_is_predicted, rows):
        tensor, layout = row.get("tensor", 1), row.get("layout", "auto")
        config = run_config(row["preset"], row["method"], 1, 1, 256)
        sizes = PRESETS[row["preset"]]
        job = Job(
            sizes,
            config.method,
            row["micro_batch"],
            256,
            accumulation=row.get("accumulation", 1),
            plan=plan_of(sizes, config.method, tensor, layout),
            data_size=row["gpus"] // tensor,
            stage=row["stage"],
            recompute=_level(row),
        )
        name = f"{row['case']}, {row['gpus']} GPU" + (f", TP {tensor}" if tensor > 1 else "")
        name += f", {job.accumulation} micro-batches" if job.accumulation > 1 else ""
        runs.append(Measured(name, job, job.tokens / row["tokens_per_second"]))
    return runs


def _level(row: dict[str, Any]) -> str:
    """Activation checkpointing of a recorded run."""
    return row.get("train", {}).get("activation_checkpointing", "none")


def _is_predicted(row: dict[str, Any]) -> bool:
    """Whether the model of time knows this kind of run: bf16, compiled, AdamW, nothing special."""
    return (
        row["precision"] == "bf16"
        and row["method"]["name"] in KNOWN
        and row.get("optimizer", {}).get("name", "adamw") == "adamw"
        and row.get("train", {}).get("compile", True)
        and _level(row) in ("none", "full")
        and not row.get("restarts")
        and row.get("sequence", 256) == 256
        and not row.get("zero")
    )


def fit(runs: list[Measured]) -> Gpu:
    """Arithmetic and memory speed and overhead that best explain runs of one GPU (relative error).

    The time is linear in 1/F, 1/B and the overhead, so this is one linear least-squares problem.
    """
    rows, scale = [], np.array([1e15, 1e12, 1.0])
    for run in runs:
        forward, backward = micro_batch_work(
            run.job.sizes, run.job.method, SINGLE, run.job.micro_batch, run.job.sequence
        )
        every, once = update_work(run.job)
        work = (forward + backward + every) * run.job.accumulation + once
        rows.append(np.array([work.flops, work.moved, 1.0]) / scale / run.seconds)
    found, *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    per_flop, per_byte, overhead = found / scale
    return Gpu(float(1 / per_flop), float(1 / per_byte), float(overhead))


def balancing(folder: Path = RESULTS) -> list[Balancing]:
    """Recorded seconds of refactorizing one matrix, by rank."""
    result = json.loads((folder / "refactorization_1.json").read_text())
    measured = []
    for row in result["models"]:
        alone = [m["ours_ms"] for m in result["single"] if m["r"] == row["r"]]
        many = row["seconds"] / row["matrices"]
        measured.append(Balancing(row["r"], float(np.mean(alone)) / 1000, many))
    return measured


def loader(folder: Path = RESULTS) -> Loader:
    """Recorded speeds of the loader, one document a sample (the slower way)."""
    result = json.loads((folder / "loader.json").read_text())
    ordered = min(row["ordered_samples_per_second"] for row in result["opening"])
    return Loader(ordered, min(row["tokens_per_second"] for row in result["batches"]))
