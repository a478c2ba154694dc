"""The synthetic data set with a tokenizer that transformers loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from megalr.data.manifest import load_manifest
from megalr.preprocessing.tokenizer import open_tokenizer, tokenizer_info
from tests.synthetic import VOCAB_SIZE, write_dataset


def write_tokenizer(folder: Path, prefix: str = "w", size: int = VOCAB_SIZE) -> Path:
    """A tokenizer of whole words ``w0``, ``w1`` (end of text), ...."""
    folder.mkdir(parents=True)
    words = {f"{prefix}{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"{prefix}2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": f"{prefix}1",
        "pad_token": f"{prefix}0",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_data(folder: Path, prefix: str = "w") -> Path:
    """``write_dataset`` with the tokenizer of :func:`write_tokenizer`."""
    write_dataset(folder)
    tokenizer = open_tokenizer(write_tokenizer(folder / "tokenizer", prefix))
    manifest = load_manifest(folder)
    replace(manifest, tokenizer=tokenizer_info(tokenizer, "tokenizer")).save(folder)
    return folder
