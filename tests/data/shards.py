"""Small data sets written by hand for tests, without tokenizer or preprocessing."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalr.data.manifest import DataManifest, ShardEntry, SourceInfo, TokenizerInfo
from megalr.preprocessing.shard_writer import ShardWriter

EOS, PAD = 1, 0
Documents = Sequence[Sequence[int]]


def megatron_index(lengths: Sequence[int], code: int = 8, itemsize: int = 2) -> bytes:
    """The bytes of an .idx file, put together field by field."""
    result = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    result += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1)
    offset, offsets = 0, []
    for length in lengths:
        offsets.append(offset)
        offset += length * itemsize
    result += struct.pack(f"<{len(lengths)}i", *lengths)
    result += struct.pack(f"<{len(lengths)}q", *offsets)
    return result + struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))


def write_shard(
    folder: Path, name: str, documents: Documents, vocab_size: int = 100, split: str = "train"
) -> ShardEntry:
    """Write one shard and return its manifest entry."""
    with ShardWriter(folder / name, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64), np.array([len(document)], np.int32))
        done = writer.finish()
    source = SourceInfo(file=f"{name}.jsonl", bytes=0, sha256="")
    return ShardEntry(name=name, split=split, source=source, **done.__dict__)


def write_dataset(
    folder: Path,
    shards: Sequence[Documents],
    vocab_size: int = 100,
    fingerprint: str = "a" * 64,
    splits: Sequence[str] | None = None,
    append_eos: bool = True,
) -> Path:
    """Write a data folder with its manifest; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = tuple(
        write_shard(folder, f"part{i}", documents, vocab_size, splits[i] if splits else "train")
        for i, documents in enumerate(shards)
    )
    tokenizer = TokenizerInfo("tokenizer", "sentencepiece", fingerprint, vocab_size, EOS, PAD)
    dtype = "uint16" if vocab_size < 65_500 else "int32"
    DataManifest(tokenizer, append_eos, dtype, entries).save(folder)
    return folder


def random_documents(
    count: int, seed: int = 0, vocab_size: int = 100, longest: int = 40
) -> list[list[int]]:
    """Documents of 1 .. ``longest`` random ids >= 3 followed by EOS."""
    random = np.random.default_rng(seed)
    return [
        [*random.integers(3, vocab_size, random.integers(1, longest + 1)).tolist(), EOS]
        for _ in range(count)
    ]
