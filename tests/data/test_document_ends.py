"""Positions of tokens in their documents, against shards and windows written out by hand."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import megalr.data.megatron_index
from megalr.data import (
    EvaluationBatches,
    TokenDataset,
    UpdateLoader,
    open_training_data,
    open_validation_data,
)
from megalr.data.manifest import load_manifest
from megalr.data.megatron_index import IndexedShard
from megalr.errors import UserError
from tests.data.shards import megatron_index, random_documents, write_dataset

NONE = -100


def _open(folder: Path, length: int) -> TokenDataset:
    return open_training_data(folder, sequence_length=length, document_mask=True)


def test_windows_of_a_shard_written_out(tmp_path: Path) -> None:
    """Documents of 2, 5, 1 and 6 tokens in windows of 4; the second began in the first window."""
    documents = [[5, 1], [6, 7, 8, 9, 1], [1], [11, 12, 13, 14, 15, 1]]
    data = _open(write_dataset(tmp_path, [documents]), 4)
    inputs, labels, positions = data.read(np.arange(4))
    assert inputs.tolist() == [[5, 1, 6, 7], [8, 9, 1, 1], [11, 12, 13, 14], [15, 1, 0, 0]]
    assert labels.tolist() == [
        [1, NONE, 7, 8],  # 1, the end of a document, has no target; 6 is none
        [9, 1, NONE, NONE],
        [12, 13, 14, 15],
        [1, NONE, NONE, NONE],
    ]
    assert positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert positions.dtype == np.int32
    assert data.count_targets(np.arange(4)).tolist() == [3, 2, 4, 1]
    assert data.mean_visible(seed=0, window=None) == np.mean(positions + 1)
    assert data.mean_visible(seed=0, window=2) == np.mean(np.minimum(positions + 1, 2))


@pytest.mark.parametrize("steps", [0, 20, 10**9], ids=["bisection", "either", "searchsorted"])
def test_every_target_is_the_next_token_of_its_document(tmp_path: Path, steps: int) -> None:
    shards = [random_documents(40, seed) for seed in range(3)] + [[[4, 1]], [[1]]]
    data = _open(write_dataset(tmp_path, shards), 16)
    with mock.patch.object(megalr.data.megatron_index, "SEARCH_STEPS", steps):
        samples = np.random.default_rng(0).permutation(data.num_samples)
        arrays = data.read(samples)
        counted = data.count_targets(samples)
    inputs, labels, positions = (array[np.argsort(samples)] for array in arrays)
    sample = 0
    for documents in shards:
        stream = [(d, i, token) for d, doc in enumerate(documents) for i, token in enumerate(doc)]
        for start in range(0, len(stream) - 1, 16):
            for t, (document, place, token) in enumerate(stream[start : start + 16]):
                behind = stream[start + t + 1 : start + t + 2]
                same = behind and behind[0][0] == document
                assert inputs[sample, t] == token
                assert labels[sample, t] == (behind[0][2] if same else NONE)
                assert positions[sample, t] == min(place, t)
            sample += 1
    assert sample == data.num_samples
    assert np.array_equal(counted[np.argsort(samples)], (labels != NONE).sum(axis=1))


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """A foreign index: three sequences, of which the first two are one document."""
    (tmp_path / "s.bin").write_bytes(struct.pack("<8H", *range(10, 18)))
    index = megatron_index([2, 3, 3])
    head = index[:26] + struct.pack("<Q", 3) + index[34 : 34 + 12 * 3]
    (tmp_path / "s.idx").write_bytes(head + struct.pack("<3q", 0, 2, 3))
    shard = IndexedShard(tmp_path / "s")
    assert shard.starts_inside(1, 6) == [5]
    for steps in (0, 10**9):
        with mock.patch.object(megalr.data.megatron_index, "SEARCH_STEPS", steps):
            assert shard.documents_before(np.array([0, 1, 5, 6])).tolist() == [0, 1, 1, 2]


def test_batches_for_training_and_evaluation_hold_positions(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [random_documents(23, seed) for seed in range(3)])
    data = _open(folder, 16)
    options = {"global_batch_size": 6, "micro_batch_size": 2, "world_size": 3, "rank": 1}
    with UpdateLoader(data, seed=1, start_update=5, **options) as loader:
        batch = next(loader)
    samples = data.sample_ids(np.arange(30, 36), 1)
    for ours, expected in zip(batch.micro_batches[0], data.read(samples[2:4]), strict=True):
        assert torch.equal(ours, torch.tensor(expected))
    assert batch.micro_batches[0][2].dtype == torch.int32
    assert batch.num_targets == (data.read(samples)[1] != NONE).sum()
    batches = EvaluationBatches(data, micro_batch_size=4)
    found = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
    order = data.sample_ids(np.arange(data.num_samples), 0)
    for ours, expected in zip(found, data.read(order), strict=True):
        assert torch.equal(ours[: len(order)], torch.tensor(expected))
    assert batches.num_targets == (found[1] != NONE).sum()
    assert found[2].shape == found[0].shape and found[2].max() < 16


def test_a_batch_that_cannot_be_read_has_the_same_shapes(tmp_path: Path) -> None:
    data = _open(write_dataset(tmp_path, [random_documents(23)]), 16)
    options = {"global_batch_size": 4, "micro_batch_size": 2, "defer_errors": True}
    planted = mock.patch.object(TokenDataset, "read", side_effect=UserError("planted"))
    with planted, UpdateLoader(data, **options) as loader:
        batch = next(loader)
    assert batch.error is not None
    for micro_batch in batch.micro_batches:
        assert [(t.shape, t.dtype) for t in micro_batch] == [
            ((2, 16), torch.int64),
            ((2, 16), torch.int64),
            ((2, 16), torch.int32),
        ]


def test_the_setting_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [random_documents(23)])
    plain = open_training_data(folder, sequence_length=16)
    assert _open(folder, 16).fingerprint != plain.fingerprint


def test_shards_without_document_ends_and_documents_by_themselves_are_refused(
    tmp_path: Path,
) -> None:
    joined = write_dataset(tmp_path / "a", [[[5] * 40], [[6] * 40]])
    message = r"a: data.document_mask is true and each of its 2 shards is one document \(80 tokens"
    for opened in (open_training_data, open_validation_data):
        with pytest.raises(UserError, match=message):
            opened(joined, sequence_length=16, document_mask=True)
    open_training_data(joined, sequence_length=16)
    open_training_data(joined, sequence_length=40, document_mask=True)  # no window ends a document
    with pytest.raises(UserError, match="packing false, where each sample is one document"):
        open_training_data(joined, sequence_length=16, packing=False, document_mask=True)


@pytest.mark.parametrize("offset", [2, 14, 1 << 40])
def test_boundaries_that_contradict_the_lengths_are_damage(tmp_path: Path, offset: int) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 1], [7, 8, 9, 1], [3, 1]]])
    path = folder / "part0.idx"
    index = bytearray(path.read_bytes())
    index[34 + 12 + 8 : 34 + 12 + 16] = struct.pack("<q", offset)  # the second document's start
    path.write_bytes(index)
    data = _open(folder, 8)
    with pytest.raises(UserError, match=r"part0.idx: document \d, from byte \d+ on, is"):
        data.read(np.arange(1))


def test_an_empty_document_is_damage(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 1], [7, 8]]], append_eos=False)
    (folder / "part0.idx").write_bytes(megatron_index([3, 0, 2]))
    manifest = load_manifest(folder)
    size = (folder / "part0.idx").stat().st_size
    entry = dataclasses.replace(manifest.shards[0], documents=3, idx_bytes=size)
    dataclasses.replace(manifest, shards=(entry,)).save(folder)
    with pytest.raises(UserError, match="document 1, from byte 6 on, is empty"):
        _open(folder, 4).read(np.arange(1))
