"""The comparison of ZeRO 3, offload and plain DeepSpeed: what is run, and what is said of it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import peer_deepspeed
import pytest
import sharded
import torch
from cases import CASES, stage_of

from megalr.errors import UserError
from tests.ranks import ON_THE_CPU

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "vocab_size": 100,
}


def test_runs_compare_the_same_batches_and_every_case_exists() -> None:
    runs = {run.name: run for run in sharded.runs(2)}
    for run in runs.values():
        words = run.arguments.split()
        assert not words or words[words.index("--cases") + 1] in CASES
        assert not run.against or run.against in runs
    # 64 sequences a micro-batch on two GPUs: 4 micro-batches make 512 sequences.
    many = [run for run in runs.values() if run.name.endswith("_many")]
    assert len(many) == 3 and all("--accumulation 4" in run.arguments for run in many)
    assert [(r.against, r.goal) for r in many if r.goal] == [
        ("zero2_many", 0.7),
        ("zero2_many", 0.6),
    ]
    offload = CASES["1b_low_rank_offload"]
    assert stage_of(offload) == 2 and offload.zero["offload_optimizer"]["device"] == "cpu"


def test_a_run_that_fails_leaves_the_others_and_ratios_are_to_the_mean_of_zero_2(
    tmp_path: Path,
) -> None:
    rates = {"zero2": 100, "zero3": 90, "zero2_again": 140, "peer_7b": 50, "zero3_7b": 75}
    arguments = argparse.Namespace(gpus=2, updates=5, output=tmp_path, only=None)

    def call(command: list[str], environment: dict[str, str]) -> int:
        assert int(environment["OMP_NUM_THREADS"]) >= 1
        peer = str(BENCHMARKS / "peer_deepspeed.py") in command
        name = "peer_7b" if peer else command[command.index("--name") + 1]
        if name not in rates:
            return 1
        row = {
            "tokens_per_second": rates[name],
            "tokens_per_second_range": [1, 2],
            "peak_memory_gib": 3.5,
        }
        file = f"{'peer_7b_full_rank_zero3' if peer else name}_2gpu.json"
        (tmp_path / file).write_text(json.dumps(row if peer else [row]))
        return 0

    found = sharded.measure(arguments, call)
    assert found.keys() == rates.keys()
    lines = sharded.table(found, sharded.runs(2)).splitlines()
    assert "| zero3 | 90 | 1 to 2 | 3.5 | zero2 | 0.750 | 0.7 |" in lines
    assert "| zero3_7b | 75 | 1 to 2 | 3.5 | peer_7b | 1.500 |  |" in lines
    assert "| zero2_again | 140 | 1 to 2 | 3.5 | zero2 | 1.400 |  |" in lines


def test_the_peer_is_transformers_model_of_the_same_sizes() -> None:
    model = peer_deepspeed.model_of(CASES["7b_full_rank_zero3"], TINY, torch.device("cpu"))
    count = 2 * 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.is_gradient_checkpointing and next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="only full_rank has a model in transformers"):
        peer_deepspeed.model_of(CASES["1b_low_rank_zero3"], TINY, torch.device("cpu"))


@pytest.mark.long
def test_the_peer_trains_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ON_THE_CPU.items():
        monkeypatch.setenv(name, value)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [str(BENCHMARKS / "peer_deepspeed.py"), "--updates", "5", "--sequence_length", "16"]
    options = ["--model", json.dumps(TINY), "--output", str(tmp_path)]
    command = [*launcher, "--nproc_per_node", "2", *program, *options]
    subprocess.run(command, check=True, timeout=280, cwd=BENCHMARKS.parent)
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert (file.name, found["gpus"]) == ("peer_7b_full_rank_zero3_2gpu.json", 2)
    low, high = found["tokens_per_second_range"]
    assert 0 < low <= found["tokens_per_second"] <= high
    assert found["ds_config"]["zero_optimization"] == {"stage": 3}
