"""Token shards that a tiny model can learn, made without text or tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalr.data.manifest import DataManifest, ShardEntry, SourceInfo, TokenizerInfo
from megalr.files import sha256_of_file, write_atomic
from megalr.preprocessing.shard_writer import ShardWriter

VOCAB_SIZE = 120
EOS = 1


def write_dataset(folder: Path, documents: int = 300, seed: int = 0) -> Path:
    """A data set of Markov-chain documents (each id has 4 likely successors) in two splits.

    The chain is the same for every ``seed``; the documents are not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.model", b"synthetic")
    chain = np.random.default_rng(7).integers(3, VOCAB_SIZE, size=(VOCAB_SIZE, 4))
    rng = np.random.default_rng(seed)
    entries = []
    for split, count in (("train", documents), ("validation", max(8, documents // 10))):
        prefix = folder / f"{split}-00000"
        with ShardWriter(prefix, VOCAB_SIZE) as writer:
            for _ in range(count):
                length = int(rng.integers(5, 60))
                ids = np.empty(length, np.int64)
                ids[0] = rng.integers(3, VOCAB_SIZE)
                for i in range(1, length - 1):
                    ids[i] = chain[ids[i - 1], rng.integers(0, 4)]
                ids[-1] = EOS
                writer.add(ids, np.array([length], np.int32))
            done = writer.finish()
        entries.append(
            ShardEntry(
                name=prefix.name,
                split=split,
                source=SourceInfo("synthetic", 0, ""),
                **done.__dict__,
            )
        )
    tokenizer = TokenizerInfo(
        "tokenizer.model",
        "sentencepiece",
        sha256_of_file(folder / "tokenizer.model"),
        VOCAB_SIZE,
        EOS,
        0,
    )
    DataManifest(tokenizer, True, "uint16", tuple(entries)).save(folder)
    return folder
