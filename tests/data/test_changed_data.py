"""Data that change while a run reads them: one line that names the file, never other tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalr.data import EvaluationBatches, UpdateLoader, dataset, open_training_data
from megalr.errors import UserError
from tests.data.shards import random_documents, write_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", [random_documents(400, seed) for seed in range(3)])


def _rewrite(path: Path, change: int = 1) -> None:
    """Other content of the same size in the same file, at another time."""
    content = bytearray(path.read_bytes())
    content[-2] ^= change
    with open(path, "r+b") as stream:
        stream.write(content)
    stamp = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_file_is_an_error_and_not_a_signal(
    folder: Path, packing: bool, suffix: str
) -> None:
    program = (
        "import os, sys, numpy\n"
        "from megalr.data import open_training_data\n"
        "packing = sys.argv[3] == 'True'\n"
        "data = open_training_data(sys.argv[1], sequence_length=16, packing=packing)\n"
        "data.read(numpy.arange(data.num_samples))\n"
        "os.truncate(sys.argv[2], 4)\n"
        "try:\n"
        "    data.read(numpy.arange(data.num_samples))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    path = folder / f"part1{suffix}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(path), str(packing)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    if packing and suffix == ".idx":  # not mapped: packed samples need no index
        assert done.stdout == ""
    else:
        assert f"{path}: was truncated to 4 bytes while in use" in done.stdout


def test_a_file_rewritten_in_place_is_noticed_at_the_next_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(dataset.time, "monotonic", lambda: clock[0])
    data = open_training_data(folder, sequence_length=16)
    samples = np.arange(data.num_samples)
    data.read(samples)
    _rewrite(folder / "part1.bin")
    data.read(samples)  # not yet
    clock[0] += dataset.CHECK_SECONDS
    with pytest.raises(UserError, match=r"part1\.bin: was changed while in use: \d+ bytes of .*"):
        data.read(samples)


@pytest.mark.parametrize("name", ["part2.bin", "part2.idx"])
def test_a_shard_that_changed_before_its_first_sample_is_refused(folder: Path, name: str) -> None:
    data = open_training_data(folder, sequence_length=16)
    data.read(np.arange(3))  # of the first shard
    _rewrite(folder / name, 0)  # as if copied again
    data.read(np.arange(3))
    with pytest.raises(UserError, match=f"{name}: was changed while in use"):
        data.read(np.arange(data.num_samples))
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: No such file or directory while in use"):
        data.read(np.arange(data.num_samples))


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_raises_the_error_or_keeps_it_for_all_ranks(
    folder: Path, prefetch: int, defer: bool
) -> None:
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "prefetch_updates": prefetch}
    data = open_training_data(folder, sequence_length=16)
    reading, read = threading.Lock(), data.read

    def read_whole(*arguments: Any) -> Any:
        with reading:  # a file cut in the middle of a read is a signal: mapped_file.py
            return read(*arguments)

    data.read = read_whole  # type: ignore[method-assign]
    with UpdateLoader(data, defer_errors=defer, **sizes) as loader:
        assert next(loader).error is None
        with reading:
            for path in folder.glob("part*.bin"):
                os.truncate(path, 2)
        if not defer:
            with pytest.raises(UserError, match=r"part\d\.bin: was (truncated|changed)"):
                for _ in range(prefetch + 2):
                    next(loader)
        else:
            batches = [next(loader) for _ in range(prefetch + 3)]
            assert [batch.update for batch in batches] == list(range(1, prefetch + 4))
            failed = [batch for batch in batches if batch.error is not None]
            assert failed and failed[-1] is batches[-1]
            assert all(batch.error is loader.error for batch in failed)
            for batch in failed:
                assert len(batch.micro_batches) == 4
                assert all((labels == -100).all() for _, labels in batch.micro_batches)


def test_an_evaluation_raises_the_error_or_keeps_it_for_all_ranks(folder: Path) -> None:
    for defer in (False, True):
        data = open_training_data(folder, sequence_length=16)
        batches = EvaluationBatches(data, micro_batch_size=4, defer_errors=defer)
        whole = list(batches)
        content = (folder / "part0.bin").read_bytes()
        os.truncate(folder / "part0.bin", 2)
        if defer:
            found = list(batches)
            assert len(found) == len(whole)
            assert "part0.bin: was truncated" in str(batches.error)
            assert (found[-1][1] == -100).all()
        else:
            with pytest.raises(UserError, match=r"part0\.bin: was truncated"):
                list(batches)
        (folder / "part0.bin").write_bytes(content)
