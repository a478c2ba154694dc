#!/usr/bin/env python3
"""Turn text into token shards: ``NAME.bin``/``NAME.idx`` per input file and a manifest over them.

    python tools/preprocess_c4.py --input 'c4/c4-train.*.json.gz' --tokenizer tokenizer/ \
        --output data/c4 --workers 16
    mpirun -n 64 python tools/preprocess_c4.py ...             (ranks share the files out)
    python tools/preprocess_c4.py ... --share 3/16             (one task of a SLURM array)
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from megalr.distributed.mpi import launched_ranks, world_communicator
from megalr.errors import UserError, exit_cleanly
from megalr.preprocessing.job import PreprocessJob, run_local
from megalr.preprocessing.mpi_workers import run_mpi
from megalr.preprocessing.split_worker import WorkSettings
from megalr.readers.documents import ReadOptions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokenize text into memory-mapped shards with a manifest. Start the same "
        "command again after an interruption: finished files are verified and kept."
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files or quoted glob patterns (.json, .jsonl, .ndjson, .txt, each also .gz or .zst; "
        ".parquet; .bin of Megatron, .ds of datatrove), or hub:DATASET[:CONFIG[:SPLIT]]",
    )
    add("--tokenizer", type=Path, required=True, help="*.model file or tokenizer folder")
    add("--output", type=Path, required=True, help="folder of the data set")
    add("--workers", type=int, default=1, help="processes on this machine (default: 1)")
    add("--text_key", default="text", help="field or column with the text (default: text)")
    add(
        "--text_documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what one document of a .txt file is (default: line)",
    )
    add(
        "--append_eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's EOS (default: yes)",
    )
    add(
        "--max_bad_lines",
        type=float,
        default=0.01,
        help="bad records skipped per file before it fails: a fraction below 1 or a number "
        "(default: 0.01)",
    )
    add(
        "--validation_fraction",
        type=float,
        default=0.0,
        help="part of the documents, chosen by hash, held out for validation (default: 0)",
    )
    add(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="what the documents are for (default: train)",
    )
    add(
        "--part_megabytes",
        type=int,
        default=1024,
        help="uncompressed files larger than this are divided at line ends (default: 1024)",
    )
    add(
        "--share",
        default="0/1",
        metavar="I/N",
        help="work on the I-th of N shares (I from 0); the last one to finish writes the manifest",
    )
    return parser.parse_args()


def parse_share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    share, shares = (int(match[1]), int(match[2])) if match else (0, 0)
    if share >= shares:
        raise UserError(f"--share is '{text}', it must be I/N with I from 0 to N - 1, such as 0/16")
    return share, shares


def make_job(args: argparse.Namespace) -> PreprocessJob:
    share, shares = parse_share(args.share)
    if args.workers < 1 or args.part_megabytes < 1:
        raise UserError("--workers and --part_megabytes must be at least 1")
    if args.workers > 1 and launched_ranks()[1] > 1:
        raise UserError("under MPI every rank is one worker: start more ranks, not --workers")
    if not args.max_bad_lines >= 0:  # nan would let everything pass
        raise UserError(f"--max_bad_lines is {args.max_bad_lines}, it must be 0 or more")
    if not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction is {args.validation_fraction}, allowed is [0, 1)")
    if args.validation_fraction and args.split == "validation":
        raise UserError("--validation_fraction holds out a part of training data: drop --split")
    settings = WorkSettings(
        output=args.output,
        tokenizer=args.tokenizer,
        append_eos=args.append_eos,
        validation_fraction=args.validation_fraction,
        split=args.split,
        reading=ReadOptions(args.text_key, args.text_documents, args.max_bad_lines),
    )
    return PreprocessJob(args.input, settings, args.part_megabytes << 20, share, shares)


def main() -> int:
    args = parse_arguments()
    if launched_ranks()[1] > 1:
        summary = run_mpi(lambda: make_job(args), world_communicator())
    else:
        summary = run_local(make_job(args), args.workers)
    if summary is not None:
        print(json.dumps(summary.__dict__, indent=1))
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
