#!/usr/bin/env python3
"""Verify and describe a data set; exit code 1 if it is damaged.

python tools/inspect_data.py data/c4 [--full] [--document 17] [--histogram lengths.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalr.errors import exit_cleanly
from megalr.preprocessing.inspection import (
    Inspection,
    draw_length_histogram,
    inspect_dataset,
    read_document,
)

DAMAGED = 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Verify a data set (sizes and index of every shard) and print its figures."
    )
    add = parser.add_argument
    add("data", type=Path, help="folder written by preprocess_c4.py")
    add("--full", action="store_true", help="also verify checksums, ids and EOS: reads everything")
    add("--document", type=int, metavar="K", help="print the K-th document (from 0) and stop")
    add("--split", default="train", choices=("train", "validation"), help="of --document")
    add("--histogram", type=Path, metavar="PNG", help="draw the document lengths")
    return parser.parse_args()


def print_inspection(folder: Path, found: Inspection) -> None:
    manifest = found.manifest
    tokenizer = manifest.tokenizer
    print(f"{folder}: {len(manifest.shards)} shards, ids as {manifest.dtype}")
    print(
        f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} ids, eos {tokenizer.eos_id} "
        f"({'appended' if manifest.append_eos else 'not appended'}), pad {tokenizer.pad_id}, "
        f"fingerprint {tokenizer.fingerprint[:16]}"
    )
    for split, figures in sorted(found.statistics.items()):
        per_shard = figures.tokens_per_shard
        print(
            f"{split}: {figures.shards} shards, {figures.documents:,} documents, "
            f"{figures.tokens:,} tokens ({figures.bytes_per_token:.2f} bytes of text per token)\n"
            f"  tokens per shard: {min(per_shard):,} to {max(per_shard):,}; tokens per document: "
            f"{figures.shortest:,} to {figures.longest:,}, "
            f"mean {figures.tokens / max(figures.documents, 1):.1f}\n"
            f"  skipped: {figures.bad_lines:,} bad records, {figures.empty_documents:,} empty "
            f"documents"
        )


def main() -> int:
    args = parse_arguments()
    if args.document is not None:
        ids, text, shard = read_document(args.data, args.document, args.split)
        print(f"document {args.document} of {args.split}, shard {shard}, {len(ids)} tokens")
        print(ids)
        print(text)
        return 0
    found = inspect_dataset(args.data, args.full)
    print_inspection(args.data, found)
    if args.histogram:
        draw_length_histogram(found.statistics, args.histogram)
        print(f"histogram of document lengths: {args.histogram}")
    for damage in found.damages:
        print(f"damaged: {damage}", file=sys.stderr)
    verdict = f"{len(found.damages)} damages" if found.damages else "sound"
    print(f"verified {'in full' if args.full else 'sizes and indices'}: {verdict}")
    return DAMAGED if found.damages else 0


if __name__ == "__main__":
    exit_cleanly(main)
