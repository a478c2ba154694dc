"""Genuine C4 with T5's tokenizer, where the environment variable MEGALR_SHARED_DATA names them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megalr.data import open_training_data
from tests.preprocessing.test_job import documents_of, preprocess

FOLDER = Path(os.environ.get("MEGALR_SHARED_DATA", "/nonexistent"))
SAMPLE = FOLDER / "c4-sample-1000.json.gz"
MODEL = FOLDER / "tokenizer" / "t5-base.spiece.model"
pytestmark = pytest.mark.skipif(not SAMPLE.is_file(), reason="MEGALR_SHARED_DATA is not set")


def test_c4_with_t5s_tokenizer_has_the_ids_of_sentencepiece_and_the_published_fill(
    tmp_path: Path,
) -> None:
    preprocess([SAMPLE], tmp_path / "data", tokenizer=MODEL)
    model = sentencepiece.SentencePieceProcessor(str(MODEL))
    with gzip.open(SAMPLE) as stream:
        expected = [[*model.encode(json.loads(line)["text"]), 1] for line in stream]
    assert documents_of(tmp_path / "data" / "c4-sample-1000") == expected
    data = open_training_data(tmp_path / "data", sequence_length=256, packing=False)
    inputs, _ = data.read(np.arange(data.num_samples))
    # 97,788 of 131,072 positions of a published batch were real tokens: 74.6 %.
    assert (inputs != data.pad_id).mean() == pytest.approx(0.746, abs=0.03)
