"""Samples: what they hold, with packing and without, and what is refused."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from megalr.data import (
    check_same_tokenizer,
    check_vocabulary,
    has_validation_split,
    open_training_data,
    open_validation_data,
)
from megalr.errors import UserError
from tests.data.shards import random_documents, write_dataset


def test_packed_samples_are_consecutive_windows_and_every_token_is_a_target_once(
    tmp_path: Path,
) -> None:
    shards = [random_documents(20, seed) for seed in range(3)] + [[[4, 1]], [[1]]]
    data = open_training_data(write_dataset(tmp_path, shards), sequence_length=16)
    inputs, labels = data.read(np.arange(data.num_samples))
    position = 0
    for documents in shards:
        stream = [token for document in documents for token in document]
        for start in range(0, len(stream) - 1, 16):
            window = stream[start : start + 17]
            row = inputs[position].tolist(), labels[position].tolist()
            missing = 17 - len(window)
            assert row[0][: len(window) - 1] == window[:-1]
            assert row[1] == window[1:] + [-100] * missing
            position += 1
    assert position == data.num_samples
    targets = data.count_targets(np.arange(data.num_samples))
    assert np.array_equal(targets, (labels != -100).sum(axis=1))
    assert targets.sum() == data.num_tokens - len(shards)


def test_unpacked_samples_follow_the_papers_protocol(tmp_path: Path) -> None:
    documents = [[5, 6, 1], [*range(3, 30), 1], [9, 1], [*range(10, 17), 1], [1]]
    data = open_training_data(
        write_dataset(tmp_path, [documents[:2], documents[2:]]), sequence_length=8, packing=False
    )
    inputs, labels = data.read(np.arange(5))
    none = -100
    assert inputs.tolist() == [
        [5, 6, 1, 0, 0, 0, 0, 0],
        [3, 4, 5, 6, 7, 8, 9, 1],  # cut to 8 ids including the appended EOS
        [9, 1, 0, 0, 0, 0, 0, 0],
        [10, 11, 12, 13, 14, 15, 16, 1],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert labels.tolist() == [
        [6, 1, none, none, none, none, none, none],
        [4, 5, 6, 7, 8, 9, 1, none],
        [1, none, none, none, none, none, none, none],
        [11, 12, 13, 14, 15, 16, 1, none],
        [none] * 8,
    ]
    assert data.count_targets(np.arange(5)).tolist() == [2, 7, 1, 7, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_samples_in_any_order_equal_one_sample_at_a_time(tmp_path: Path, packing: bool) -> None:
    shards = [random_documents(9, 0), [], random_documents(7, 1), [], [], random_documents(1, 2)]
    data = open_training_data(write_dataset(tmp_path, shards), sequence_length=16, packing=packing)
    samples = np.random.default_rng(0).integers(0, data.num_samples, 200)  # some many times
    inputs, labels = data.read(samples)
    targets = data.count_targets(samples)
    for row, sample in enumerate(samples):
        one = data.read(np.array([sample]))
        assert np.array_equal(inputs[row], one[0][0]) and np.array_equal(labels[row], one[1][0])
        assert targets[row] == (one[1] != -100).sum()


def test_without_appended_eos_a_cut_document_gets_none(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 7, 8, 9]]], append_eos=False)
    data = open_training_data(folder, sequence_length=3, packing=False)
    assert data.read(np.array([0]))[0].tolist() == [[5, 6, 7]]


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 1]], [[7, 8, 9, 1]]], splits=["train", "validation"])
    assert has_validation_split(folder)
    assert open_training_data(folder, sequence_length=4).num_tokens == 3
    assert open_validation_data(folder, sequence_length=4).num_tokens == 4
    only_train = write_dataset(tmp_path / "b", [[[5, 6, 1]]])
    assert open_validation_data(only_train, sequence_length=4).num_tokens == 3
    only_validation = write_dataset(tmp_path / "c", [[[5, 1]]], splits=["validation"])
    with pytest.raises(UserError, match="no shard of the split 'train'"):
        open_training_data(only_validation, sequence_length=4)


def test_a_weighted_mixture_knows_the_source_of_every_sample(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a", [random_documents(40)])
    b = write_dataset(tmp_path / "b", [random_documents(10, 1), random_documents(10, 2)])
    items = [{"path": str(a), "weight": 0.75}, {"path": str(b), "weight": 0.25}]
    data = open_training_data(items, sequence_length=8)
    samples = data.sample_ids(np.arange(1000), seed=0)
    assert np.bincount(data.source_of(samples)).tolist() == [750, 250]
    assert [source.path for source in data.sources] == [a, b]
    again = open_training_data(items, sequence_length=8)
    assert again.fingerprint == data.fingerprint
    items[0]["weight"] = 0.5
    assert open_training_data(items, sequence_length=8).fingerprint != data.fingerprint


def test_mixtures_of_tokenizers_and_bad_weights_are_refused(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a", [[[5, 6, 1]]])
    b = write_dataset(tmp_path / "b", [[[5, 6, 1]]], fingerprint="b" * 64)
    with pytest.raises(UserError, match="different tokenizers"):
        open_training_data([a, b], sequence_length=4)
    with pytest.raises(UserError, match="different tokenizers"):
        check_same_tokenizer(
            open_training_data(a, sequence_length=4), open_training_data(b, sequence_length=4)
        )
    with pytest.raises(UserError, match="weight 0 must be a positive number"):
        open_training_data([{"path": a, "weight": 0}], sequence_length=4)
    with pytest.raises(UserError, match="has no weight and others have"):
        open_training_data([{"path": a, "weight": 1}, a], sequence_length=4)
    with pytest.raises(UserError, match="not 'wieght'"):
        open_training_data([{"path": a, "wieght": 1}], sequence_length=4)
    with pytest.raises(UserError, match="takes no weights"):
        open_validation_data([{"path": a, "weight": 1}], sequence_length=4)


def test_the_vocabulary_must_fit_the_model(tmp_path: Path) -> None:
    data = open_training_data(write_dataset(tmp_path, [[[5, 6, 1]]]), sequence_length=4)
    check_vocabulary(data, 100)
    with pytest.raises(UserError, match=r"100 ids \(largest in the data 6\).*is 99"):
        check_vocabulary(data, 99)


def test_an_id_beyond_the_vocabulary_never_leaves_the_data_set(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 7, 1]], [[5, 6, 7, 1]]])
    (folder / "part1.bin").write_bytes(struct.pack("<4H", 5, 60_000, 7, 1))
    data = open_training_data(folder, sequence_length=4)
    with pytest.raises(UserError, match=r"part1\.bin: holds id 60000, outside the vocabulary of 1"):
        data.read(np.arange(2))


def test_damaged_data_sets_are_refused_on_opening(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", [[[5, 6, 7, 1]], [[5, 6, 7, 1]]])
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        open_training_data(tmp_path / "nowhere", sequence_length=4)
    content = (folder / "part1.bin").read_bytes()
    (folder / "part1.bin").write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"part1\.bin: 6 bytes, the manifest says 8"):
        open_training_data(folder, sequence_length=4)
    (folder / "part1.bin").unlink()
    with pytest.raises(UserError, match=r"part1\.bin: the manifest lists this file"):
        open_training_data(folder, sequence_length=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("tokenizer"), "tokenizer"),
        (lambda m: m.update(format_version=9), "manifest version 9"),
        (lambda m: m.update(format="x"), "not a manifest"),
        (lambda m: m.update(colour=1), "unknown key 'colour'"),
        (lambda m: m["shards"][0].pop("tokens"), "shard 0: .*tokens"),
        (lambda m: m["shards"].pop(), "totals do not match"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change, message: str) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 7, 1]], [[5, 6, 7, 1]]])
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}"):
        open_training_data(folder, sequence_length=4)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        open_training_data(folder, sequence_length=4)


def test_data_without_a_single_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train sample in 1 shards with 1 tokens"):
        open_training_data(write_dataset(tmp_path, [[[1]]]), sequence_length=4)
    with pytest.raises(UserError, match="sequence_length is 1"):
        open_training_data(tmp_path, sequence_length=1)


def test_text_and_shards_without_a_manifest_are_told_apart_from_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp_path / "plain.bin").write_bytes(bytes(8))
    (tmp_path / "other.json").write_text("{}")
    for name in ("text.jsonl", "plain.bin", "other.json"):
        command = f"megalr data --input {tmp_path / name} "
        with pytest.raises(UserError, match=rf"{name}: is no data set .*{re.escape(command)}"):
            open_training_data(tmp_path / name, sequence_length=4)
    with pytest.raises(UserError, match=r"plain\.bin: is no data set"):
        open_training_data(tmp_path / "plain", sequence_length=4)
    with pytest.raises(UserError, match=rf"If this folder holds text, .* --input {tmp_path} "):
        open_training_data(tmp_path, sequence_length=4)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished; start its command again"):
        open_training_data(tmp_path, sequence_length=4)


def _without_checksum(folder: Path, change) -> None:
    """Change a manifest as an older version wrote it, with totals that fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256", None)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tokenizer"].update(eos_id=100), "eos_id is 100, outside the vocabulary of 1"),
        (lambda m: m["tokenizer"].update(pad_id=-1), "tokenizer: pad_id is -1"),
        (lambda m: m["tokenizer"].update(pad_id=True), "tokenizer: pad_id is True"),
        (lambda m: m["tokenizer"].update(eos_id=None), "append_eos is true and .* no eos_id"),
        (lambda m: m["tokenizer"].update(vocab_size="100"), "vocab_size is '100'"),
        (lambda m: m["tokenizer"].update(path="../x"), "tokenizer: path is '../x'"),
        (lambda m: m.update(append_eos=1), "append_eos is 1"),
        (lambda m: m.update(dtype="int32"), "dtype is 'int32', a vocabulary of 100 needs uint16"),
        (lambda m: m.update(shards={}), "shards is {}"),
        (lambda m: m.update(shards=None), "shards is None"),
        (lambda m: m.update(tokenizer=[]), "tokenizer is "),
        (lambda m: m["shards"][0].update(name="/etc/x"), "shard 0: name is '/etc/x'"),
        (lambda m: m["shards"][1].update(name="part0"), "lists the shard 'part0' 2 times"),
        (lambda m: m["shards"][0].update(tokens=4.0), r"shard 0: tokens is 4\.0"),
        (lambda m: m["shards"][0].update(split="test"), "shard 0: split is 'test'"),
        (lambda m: m["shards"][0].update(max_id=100), "shard 0: max_id is 100"),
        (lambda m: m["shards"][0]["source"].update(start=9), "the source runs from 9 back to 0"),
        (lambda m: m["shards"][0].update(source="a"), "shard 0: source is 'a'"),
    ],
)
def test_types_and_ranges_of_a_manifest_are_checked(tmp_path: Path, change, message: str) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 7, 1]], [[5, 6, 7, 1]]])
    _without_checksum(folder, lambda manifest: None)
    open_training_data(folder, sequence_length=4)  # as older versions wrote it
    _without_checksum(folder, change)
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}") as caught:
        open_training_data(folder, sequence_length=4)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_was_edited_where_nothing_else_shows_it_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [[[5, 6, 7, 1]]])
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in (("eos_id", 2), ("pad_id", 3)):
        changed = {**manifest, "tokenizer": {**manifest["tokenizer"], key: value}}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"manifest\.json: does not match its own checksum"):
            open_training_data(folder, sequence_length=4)
