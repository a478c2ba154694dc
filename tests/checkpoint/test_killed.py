"""A run of two processes that is killed again and again ends as if it had never been."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalr.checkpoint.manifest import check_files, read_manifest
from tests.ranks import CONTEXT, become_rank, free_port, run_distributed
from tests.training.runs import events, run, settings, zero

pytestmark = pytest.mark.long

ROUNDS = 15
SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "preset": "llama_9m",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "vocab_size": 120,
        "pad_multiple": 16,
    },
    "method": {"name": "low_rank", "rank": 4, "alpha": 8.0},
    "train": {"updates": 45, "global_batch_size": 4},
    "restarts": {"every": 7},
    "evaluation": {"every": 15},
    "checkpoint": {"every": 1, "keep_last": 2},
}


def _rank(rank: int, port: int, values: dict[str, Any], output: str) -> None:
    """One process of a run, as a launcher would start it."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    become_rank(rank, 2, port)
    import torch

    torch.set_num_threads(1)
    run(values, zero(1))


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saving(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("checkpoints/.saving-*")]


def _wait(condition: Callable[[], Any], processes: list[Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and any(p.is_alive() for p in processes):
        assert time.monotonic() < deadline, "the run does nothing"
        time.sleep(0.003)


def _one_round(number: int, rng: random.Random, values: dict[str, Any], folder: Path) -> None:
    """Start the run, kill it at a moment of its own kind."""
    port = free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(r, port, values, f"{folder}.log")) for r in (0, 1)
    ]
    before = _lines(folder)
    for process in processes:
        process.start()
    if number % 8 == 0:  # anywhere during start-up
        time.sleep(rng.uniform(0, 1.5))
    elif number % 2:  # while a checkpoint is being written
        _wait(lambda: _lines(folder) > before + rng.randrange(6), processes)
        _wait(lambda: _saving(folder), processes)
        time.sleep(rng.uniform(0, 0.03))
    else:  # anywhere else
        _wait(lambda: _lines(folder) > before + 3 + rng.randrange(6), processes)
        time.sleep(rng.uniform(0, 0.1))
    victims = rng.sample(processes, 2)
    victims[0].kill()
    time.sleep(rng.choice([0, 0.02]))
    victims[1].kill()
    for process in processes:
        process.join()


def test_fifteen_kills_change_no_bit_of_the_losses(data: Path, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    run_distributed(run, 2, settings(unbroken, data, **SMALL), zero(1))
    values = settings(killed, data, **SMALL)
    rng = random.Random(11)
    cut_short = 0
    for number in range(ROUNDS):
        _one_round(number, rng, values, killed)
        cut_short += bool(_saving(killed))
        latest = killed / "checkpoints" / "latest"
        if latest.exists():
            folder = latest.parent / latest.read_text()
            manifest = read_manifest(folder)
            assert check_files(folder, manifest.files, manifest.files, checksums=True) is None
    assert cut_short >= 2  # some died while saving
    run_distributed(run, 2, values, zero(1))
    resumes = events(killed, "resume")
    assert len(resumes) >= ROUNDS // 2 and resumes[-1]["update"] < 45
    for kind, keys in (("step", ("loss", "gradient_norm")), ("eval", ("loss",))):
        expected = {e["update"]: [e[key] for key in keys] for e in events(unbroken, kind)}
        found = [(e["update"], [e[key] for key in keys]) for e in events(killed, kind)]
        assert {update for update, _ in found} == set(expected)
        for update, numbers in found:  # repeated updates included
            assert numbers == expected[update], f"{kind} {update}"
