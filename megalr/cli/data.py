"""``megalr tokenizer``, ``megalr data`` and ``megalr inspect``: from text to verified shards."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.cli.command_line import new_parser, only_one, parse
from megalr.errors import UserError

if TYPE_CHECKING:
    from megalr.preprocessing.inspection import Inspection
    from megalr.preprocessing.job import PreprocessJob

DAMAGED = 1
"""Exit code of ``inspect`` for a damaged data set."""


def _add_input(parser: argparse.ArgumentParser, output: str) -> None:
    """Options of everything that reads text."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files or quoted glob patterns (.json, .jsonl, .ndjson, .txt, each also .gz or .zst; "
        ".parquet; .bin of Megatron, .ds of datatrove), or hub:DATASET[:CONFIG[:SPLIT]]",
    )
    add("--output", type=Path, required=True, help=output)
    add("--text_key", default="text", help="field or column with the text (default: text)")
    add(
        "--text_documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what one document of a .txt file is (default: line)",
    )
    add(
        "--max_bad_lines",
        type=float,
        default=0.01,
        help="bad records skipped per file before it fails: a fraction below 1 or a number "
        "(default: 0.01)",
    )


def tokenizer_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr tokenizer``."""
    parser = new_parser(
        "tokenizer",
        prog,
        "It is a unigram model with byte fallback (pad 0, eos 1, unk 2); `megalr data` and "
        "transformers read the folder.",
    )
    _add_input(parser, "folder of the tokenizer; must not exist")
    add = parser.add_argument
    add("--vocab_size", type=int, required=True, help="number of ids, special ids included")
    add(
        "--sample_megabytes",
        type=int,
        default=100,
        help="text to train on, the same share from every file (default: 100)",
    )
    add(
        "--threads",
        type=int,
        help="another number may give some pieces other ids (default: 16, on every machine)",
    )
    return parser


def tokenizer_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train a tokenizer; print its size."""
    args = parse(tokenizer_parser(prog), words)
    from megalr.preprocessing.tokenizer_training import THREADS, train_tokenizer
    from megalr.readers.documents import ReadOptions

    threads = THREADS if args.threads is None else args.threads
    if args.sample_megabytes < 1 or threads < 1:
        raise UserError("--sample_megabytes and --threads must be at least 1")
    reading = ReadOptions(args.text_key, args.text_documents, args.max_bad_lines)
    tokenizer, sample = train_tokenizer(
        args.input,
        args.output,
        args.vocab_size,
        reading,
        args.sample_megabytes * 1_000_000,
        threads,
    )
    print(
        f"{args.output}: {tokenizer.vocab_size} ids, trained on {sample.documents:,} documents "
        f"({sample.text_bytes / 1e6:.1f} MB) of {sample.files} files"
    )
    return 0


def data_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr data``."""
    parser = new_parser(
        "data",
        prog,
        "Every input file becomes NAME.bin and NAME.idx. Start the same command again after an "
        "interruption: finished files are verified and kept. Under mpirun the ranks share the "
        "files out.",
    )
    _add_input(parser, "folder of the data set")
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="*.model file or tokenizer folder")
    add("--workers", type=int, default=1, help="processes on this machine (default: 1)")
    add(
        "--append_eos",
        action="store_true",
        default=True,
        help="end every document with the tokenizer's EOS (default)",
    )
    add("--no_append_eos", dest="append_eos", action="store_false", help="do not")
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
        help="work on the I-th of N shares (I from 0), as a task of a SLURM array; the last one to "
        "finish writes the manifest",
    )
    return parser


def data_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Preprocess; print the summary as JSON."""
    args = parse(data_parser(prog), words)
    from megalr.distributed.mpi import launched_ranks, world_communicator
    from megalr.preprocessing.job import run_local
    from megalr.preprocessing.mpi_workers import run_mpi

    ranks = launched_ranks()[1]
    if ranks > 1:
        summary = run_mpi(lambda: _make_job(args, ranks), world_communicator())
    else:
        summary = run_local(_make_job(args, ranks), args.workers)
    if summary is not None:
        print(json.dumps(summary.__dict__, indent=1))
    return 0


def _make_job(args: argparse.Namespace, ranks: int) -> PreprocessJob:
    from megalr.preprocessing.job import PreprocessJob
    from megalr.preprocessing.split_worker import WorkSettings
    from megalr.readers.documents import ReadOptions

    share, shares = _share(args.share)
    if args.workers < 1 or args.part_megabytes < 1:
        raise UserError("--workers and --part_megabytes must be at least 1")
    if args.workers > 1 and ranks > 1:
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


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    share, shares = (int(match[1]), int(match[2])) if match else (0, 0)
    if share >= shares:
        raise UserError(f"--share is '{text}', it must be I/N with I from 0 to N - 1, such as 0/16")
    return share, shares


def inspect_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr inspect``."""
    parser = new_parser("inspect", prog)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DATA", help="the same as --data DATA")
    add("--data", type=Path, help="folder written by `megalr data`")
    add("--full", action="store_true", help="also verify checksums, ids and EOS: reads everything")
    add("--document", type=int, metavar="K", help="print the K-th document (from 0) and stop")
    add("--split", default="train", choices=("train", "validation"), help="of --document")
    add("--histogram", type=Path, metavar="PNG", help="draw the document lengths")
    return parser


def inspect_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Verify, print, draw; DAMAGED if the data set is."""
    args = parse(inspect_parser(prog), words)
    data = only_one("--data", args.data, args.folder)
    from megalr.preprocessing.inspection import (
        draw_length_histogram,
        inspect_dataset,
        read_document,
    )

    if args.document is not None:
        ids, text, shard = read_document(data, args.document, args.split)
        print(f"document {args.document} of {args.split}, shard {shard}, {len(ids)} tokens")
        print(ids)
        print(text)
        return 0
    found = inspect_dataset(data, args.full)
    _print_inspection(data, found)
    if args.histogram:
        draw_length_histogram(found.statistics, args.histogram)
        print(f"histogram of document lengths: {args.histogram}")
    for damage in found.damages:
        print(f"damaged: {damage}", file=sys.stderr)
    verdict = f"{len(found.damages)} damages" if found.damages else "sound"
    print(f"verified {'in full' if args.full else 'sizes and indices'}: {verdict}")
    return DAMAGED if found.damages else 0


def _print_inspection(folder: Path, found: Inspection) -> None:
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
