"""tools/inspect_data.py: what it verifies, prints, draws, and its exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megalr.preprocessing.inspection import inspect_dataset
from megalr.preprocessing.job import PreprocessJob, run_local
from megalr.preprocessing.split_worker import WorkSettings
from tests.data.shards import write_dataset
from tests.preprocessing.corpus import prose, run_tool, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    inputs = [str(write_jsonl(folder / f"{n}.jsonl", prose(60, seed=n))) for n in range(3)]
    settings = WorkSettings(folder / "data", tiny_tokenizer(), validation_fraction=0.1)
    run_local(PreprocessJob(inputs, settings, 1 << 30), 1)
    return folder / "data"


def test_a_sound_data_set_is_described_and_drawn(dataset: Path, tmp_path: Path) -> None:
    png = tmp_path / "lengths.png"
    done = run_tool("inspect_data", dataset, "--full", "--histogram", png)
    assert "verified in full: sound" in done.stdout
    assert "6 shards, ids as uint16" in done.stdout
    assert "eos 1 (appended), pad 0" in done.stdout
    assert "train: 3 shards" in done.stdout and "validation: 3 shards" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_kth_document_is_decoded(dataset: Path) -> None:
    texts = [text for n in range(3) for text in prose(60, seed=n)]
    total = int(run_tool("inspect_data", dataset).stdout.split("train: 3 shards, ")[1].split()[0])
    first = run_tool("inspect_data", dataset, "--document", 0).stdout
    last = run_tool("inspect_data", dataset, "--document", total - 1).stdout
    assert first.splitlines()[0].startswith("document 0 of train, shard 0, ")
    assert any(first.split("]\n", 1)[1].strip() == text for text in texts[:5])
    assert any(last.split("]\n", 1)[1].strip() == text for text in texts[-5:])
    failed = run_tool("inspect_data", dataset, "--document", total, check=False)
    assert failed.returncode == 2
    assert f"no document {total}, the split 'train' has {total}" in failed.stderr


def test_every_kind_of_damage_is_found_and_makes_the_exit_code_one(
    dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    flipped = bytearray((copy / "0.bin").read_bytes())
    flipped[10] ^= 1
    (copy / "0.bin").write_bytes(bytes(flipped))
    (copy / "1.idx").write_bytes((copy / "1.idx").read_bytes()[:-8])
    (copy / "2.bin").unlink()
    quick = run_tool("inspect_data", copy, check=False)
    assert quick.returncode == 1
    assert quick.stderr.count("damaged: ") == 2  # a flipped bit needs --full
    assert "1.idx" in quick.stderr and "2.bin" in quick.stderr
    full = run_tool("inspect_data", copy, "--full", check=False)
    assert full.returncode == 1
    assert full.stderr.count("damaged: ") == 3
    assert "0.bin: SHA-256 is" in full.stderr


def test_the_full_check_finds_missing_eos_and_a_foreign_tokenizer(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [[[5, 6, 1], [7, 8]]])
    shutil.copytree(tiny_tokenizer(), folder / "tokenizer")
    assert inspect_dataset(folder).damages == []
    damages = inspect_dataset(folder, full=True).damages
    assert len(damages) == 2
    assert "fingerprint" in damages[0]
    assert "1 documents do not end in EOS (1), the first is document 1" in damages[1]


def test_a_folder_without_a_manifest_is_a_users_mistake(tmp_path: Path) -> None:
    failed = run_tool("inspect_data", tmp_path, check=False)
    assert failed.returncode == 2
    assert "no such file; a data set is a folder" in failed.stderr
