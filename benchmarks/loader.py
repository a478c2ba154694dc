"""Opening all of C4 and ordering it, and the rate of the batches.

    python benchmarks/loader.py [--documents N] [--data data/c4] [--model_tokens_per_second N]

Measured:
* opening a manifest of 1,032 shards (synthetic index files, sparse token files: 20 bytes of disk a
  document) and producing the first 1,000 global batches of 512 samples, each with its shard, place
  and number of targets, packed and one document a sample; nothing is built beforehand;
* tokens a second of UpdateLoader, on real shards if given, else on random ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import provenance, save

from megalr.data import TokenDataset, UpdateLoader, open_training_data
from megalr.data.loader import SAMPLES_PLANNED
from megalr.data.manifest import DataManifest, ShardEntry, SourceInfo, TokenizerInfo
from megalr.data.megatron_index import HEADER, MAGIC
from megalr.errors import exit_cleanly
from megalr.preprocessing.shard_writer import ShardWriter

SHARDS, BATCH, UPDATES, LENGTH = 1032, 512, 1000, 256
VOCAB_SIZE, EOS = 32_000, 1


def entry(name: str, documents: int, tokens: int, idx_bytes: int) -> ShardEntry:
    return ShardEntry(
        name=name,
        split="train",
        documents=documents,
        tokens=tokens,
        max_id=VOCAB_SIZE - 1,
        bin_bytes=2 * tokens,
        idx_bytes=idx_bytes,
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
        source=SourceInfo(file=name, bytes=0, sha256=""),
    )


def save_manifest(folder: Path, entries: list[ShardEntry]) -> Path:
    tokenizer = TokenizerInfo("tokenizer", "sentencepiece", "0" * 64, VOCAB_SIZE, EOS, 0)
    DataManifest(tokenizer, True, "uint16", tuple(entries)).save(folder)
    return folder


def synthetic_c4(folder: Path, documents: int) -> Path:
    """Index files of C4's size with lengths around 430 tokens; the token files are holes."""
    random = np.random.default_rng(0)
    entries = []
    per_shard = documents // SHARDS
    for number in range(SHARDS):
        count = per_shard + (number < documents - per_shard * SHARDS)
        lengths = random.integers(20, 840, count, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens, name = int(ends[-1]), f"c4-train.{number:05d}"
        with open(folder / f"{name}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
            stream.write(lengths.tobytes() + (2 * (ends - lengths)).tobytes())
            stream.write(np.arange(count + 1, dtype=np.int64).tobytes())
            size = stream.tell()
        with open(folder / f"{name}.bin", "wb") as stream:
            stream.truncate(2 * tokens)
        entries.append(entry(name, count, tokens, size))
    return save_manifest(folder, entries)


def random_shards(folder: Path, tokens: int) -> Path:
    random = np.random.default_rng(0)
    entries = []
    for number in range(4):
        with ShardWriter(folder / f"s{number}", VOCAB_SIZE) as writer:
            for _ in range(tokens // 4 // 430_000):
                ids = random.integers(3, VOCAB_SIZE, 430_000)
                writer.add(ids, np.full(1000, 430, np.int32))
            done = writer.finish()
        source = SourceInfo(file="random", bytes=0, sha256="")
        entries.append(ShardEntry(f"s{number}", "train", source=source, **done.__dict__))
    return save_manifest(folder, entries)


def opening(folder: Path, packing: bool) -> dict[str, Any]:
    start = time.perf_counter()
    dataset = open_training_data(folder, sequence_length=LENGTH, packing=packing)
    opened = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    targets = 0
    at_once = SAMPLES_PLANNED // BATCH  # updates planned together, as UpdateLoader does
    for first in range(0, UPDATES, at_once):
        updates = min(at_once, UPDATES - first)
        positions = np.arange(first * BATCH, (first + updates) * BATCH, dtype=np.int64)
        samples = dataset.sample_ids(positions, seed=0)
        targets += int(dataset.count_targets(samples).sum())
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "packing": packing,
        "samples": dataset.num_samples,
        "open_seconds": round(opened, 3),
        "ordered_samples_per_second": round(UPDATES * BATCH / wall),
        "ordered_samples_per_cpu_second": round(UPDATES * BATCH / cpu),
        "targets": targets,
    }


def batches(dataset: TokenDataset, prefetch: int) -> dict[str, Any]:
    """Positions a second that the consumer receives."""
    with UpdateLoader(
        dataset, global_batch_size=BATCH, micro_batch_size=BATCH, prefetch_updates=prefetch
    ) as loader:
        for _ in range(20):
            next(loader)
        start, updates = time.perf_counter(), 300
        for _ in range(updates):
            next(loader)
        seconds = time.perf_counter() - start
    return {
        "packing": dataset.packing,
        "prefetch_updates": prefetch,
        "samples_per_second": round(updates * BATCH / seconds),
        "tokens_per_second": round(updates * BATCH * LENGTH / seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=364_868_892, help="of the synthetic C4")
    parser.add_argument("--data", type=Path, help="data set for the rate of the batches")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of the random shards")
    parser.add_argument(
        "--model_tokens_per_second", type=float, help="what the 9M model consumes on this machine"
    )
    parser.add_argument("--name", default="loader", help="of the result file")
    args = parser.parse_args()
    result = provenance(("numpy", "torch"))
    with tempfile.TemporaryDirectory() as folder:
        synthetic_c4(Path(folder), args.documents)
        result["documents"], result["shards"] = args.documents, SHARDS
        result["opening"] = [opening(Path(folder), packing) for packing in (True, False)]
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or random_shards(Path(folder), args.tokens)
        result["batches"] = [
            batches(open_training_data(data, sequence_length=LENGTH, packing=packing), prefetch)
            for packing in (True, False)
            for prefetch in (0, 2)
        ]
    if args.model_tokens_per_second:
        result["model_tokens_per_second"] = args.model_tokens_per_second
        slowest = min(row["tokens_per_second"] for row in result["batches"])
        result["slowest_over_model"] = round(slowest / args.model_tokens_per_second, 1)
    save(args.name, result)
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
