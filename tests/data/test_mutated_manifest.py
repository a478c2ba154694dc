"""Damaged manifests: one line, or the same samples; never a traceback, never other tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalr.data import open_training_data, open_validation_data
from megalr.errors import UserError
from tests.damage import mutated_bytes, mutated_json
from tests.data.shards import random_documents, write_dataset


def _contents(folder: Path) -> list[Any]:
    """All that training takes from a data set, packed and not."""
    found: list[Any] = []
    for opened in (open_training_data, open_validation_data):
        for packing in (True, False):
            data = opened(folder, sequence_length=16, packing=packing)
            inputs, labels = data.read(np.arange(data.num_samples))
            found += [data.fingerprint, data.tokenizer, data.append_eos]
            found += [inputs.tobytes(), labels.tobytes()]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = [random_documents(20, 0), random_documents(9, 1), random_documents(5, 2)]
    return write_dataset(tmp_path, shards, splits=["train", "train", "validation"])


def _opens(folder: Path) -> list[Any] | None:
    try:
        return _contents(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400 + len(str(folder))
        return None


def test_mutated_manifests_are_refused_or_mean_the_same(folder: Path) -> None:
    expected, path = _contents(folder), folder / "manifest.json"
    whole = path.read_bytes()
    refused = 0
    for seed in range(400):
        path.write_text(json.dumps(mutated_json(json.loads(whole), seed)))
        found = _opens(folder)
        assert found in (None, expected), seed
        refused += found is None
    for seed in range(200):
        path.write_bytes(mutated_bytes(whole, seed))
        assert _opens(folder) in (None, expected), seed
    assert refused > 380


def test_mutated_manifests_of_older_versions_are_never_a_traceback(folder: Path) -> None:
    """Without a checksum of their own the ids of EOS and padding cannot be verified."""
    expected, path = _contents(folder), folder / "manifest.json"
    older = json.loads(path.read_bytes())
    del older["sha256"]
    path.write_text(json.dumps(older))
    assert _contents(folder) == expected
    for seed in range(300):
        changed = mutated_json(older, seed)
        for key in ("eos_id", "pad_id"):
            if isinstance(changed.get("tokenizer"), dict) and key in changed["tokenizer"]:
                changed["tokenizer"][key] = older["tokenizer"][key]
        path.write_text(json.dumps(changed))
        assert _opens(folder) in (None, expected), seed


def test_deep_and_huge_json_is_refused(folder: Path) -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 5000 + "}", "null", ""):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: ") as caught:
            open_training_data(folder, sequence_length=16)
        assert "\n" not in str(caught.value)
