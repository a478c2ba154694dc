#!/usr/bin/env python3
"""Train a SentencePiece tokenizer.

python tools/train_tokenizer.py --input 'c4/*.json.gz' --vocab_size 32000 --output tokenizer/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalr.errors import UserError, exit_cleanly
from megalr.preprocessing.tokenizer_training import default_threads, train_tokenizer
from megalr.readers.documents import ReadOptions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece unigram tokenizer with byte fallback (pad 0, eos 1, "
        "unk 2). The output folder is read by tools/preprocess_c4.py and by transformers."
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files or quoted glob patterns, as preprocess_c4")
    add("--vocab_size", type=int, required=True, help="number of ids, special ids included")
    add("--output", type=Path, required=True, help="folder of the tokenizer; must not exist")
    add("--text_key", default="text", help="field or column with the text (default: text)")
    add(
        "--text_documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what one document of a .txt file is (default: line)",
    )
    add("--max_bad_lines", type=float, default=0.01, help="as preprocess_c4 (default: 0.01)")
    add(
        "--sample_megabytes",
        type=int,
        default=100,
        help="text to train on, the same share from every file (default: 100)",
    )
    add("--threads", type=int, default=default_threads(), help="default: all cores")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.sample_megabytes < 1 or args.threads < 1:
        raise UserError("--sample_megabytes and --threads must be at least 1")
    reading = ReadOptions(args.text_key, args.text_documents, args.max_bad_lines)
    tokenizer, sample = train_tokenizer(
        args.input,
        args.output,
        args.vocab_size,
        reading,
        args.sample_megabytes * 1_000_000,
        args.threads,
    )
    print(
        f"{args.output}: {tokenizer.vocab_size} ids, trained on {sample.documents:,} documents "
        f"({sample.text_bytes / 1e6:.1f} MB) of {sample.files} files"
    )
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
