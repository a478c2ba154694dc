"""``megalr export``, ``import``, ``factorize`` and ``reshape``: models for other programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megalr.cli.command_line import new_parser, only_one, parse


def export_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr export``."""
    parser = new_parser("export", prog, "With tokenizer and model card.")
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="RUN", help="the same as --run RUN")
    add("--run", type=Path, help="folder of the run")
    add("--tag", help="checkpoint, for example update_1000 (default: the newest)")
    add("--output", type=Path, required=True, help="folder to write: new or empty")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default: %(default)s, the unrounded master weights)",
    )
    add(
        "--form",
        choices=("dense", "factorized"),
        default="dense",
        help="matrices multiplied out, or the factors as trained (default: %(default)s)",
    )
    add(
        "--keep_padding",
        action="store_true",
        help="MLP width with the zeros of model.pad_multiple, for speed where it is an odd number",
    )
    add("--max_shard_size", default="5GB", help="largest weight file (default: %(default)s)")
    add("--tokenizer", help="tokenizer to add, or none (default: that of the training data)")
    return parser


def export_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Export; print what was written."""
    arguments = parse(export_parser(prog), words)
    run = only_one("--run", arguments.run, arguments.folder)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from megalr.hf.export_run import export_run

    checkpoint = export_run(
        run,
        arguments.tag,
        arguments.output,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.tokenizer,
        arguments.form,
        arguments.keep_padding,
    )
    facts = f"{checkpoint.folder.name}, {arguments.form}, {arguments.dtype}"
    print(f"written: {arguments.output} ({facts})")


def import_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr import``."""
    parser = new_parser(
        "import", prog, "Nothing is written: a run starts from the model by model.from_pretrained."
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="MODEL", help="the same as --model MODEL")
    add("--model", type=Path, help="folder with a transformers model")
    add("--method", choices=("low_rank", "sltrain"), default="low_rank")
    add("--rank", type=int, nargs="+", required=True, help="ranks to try")
    add("--density", type=float, default=0.01, help="of sltrain (default: %(default)s)")
    return parser


def import_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Factorize without saving; print a table of relative errors."""
    arguments = parse(import_parser(prog), words)
    model = only_one("--model", arguments.model, arguments.folder)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from megalr.hf.init_from_pretrained import trial_import

    print("|W - W_model| / |W|, mean over the layers (largest)")
    for rank in arguments.rank:
        density = arguments.density if arguments.method == "sltrain" else None
        errors = trial_import(model, rank, density).by_projection()
        cells = (f"{name} {mean:.3f} ({most:.3f})" for name, (mean, most) in errors.items())
        print(f"rank {rank}:  " + "  ".join(cells), flush=True)


def reshape_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr reshape``."""
    parser = new_parser(
        "reshape",
        prog,
        "Runs resume on another number of ranks or ZeRO stage without it. The folder "
        "CHECKPOINT_universal is self-contained and can be read by other programs.",
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="RUN", help="the same as --run RUN")
    add("--run", type=Path, help="folder of the run")
    add("--tag", help="the checkpoint, e.g. update_1000 (default: the newest)")
    return parser


def reshape_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the universal folder; print its path."""
    arguments = parse(reshape_parser(prog), words)
    run = only_one("--run", arguments.run, arguments.folder)
    from tqdm import tqdm

    from megalr.checkpoint import open_checkpoint
    from megalr.checkpoint.reshape import write_universal

    checkpoint = open_checkpoint(run, arguments.tag)
    with tqdm(unit="parameter", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = write_universal(checkpoint, show)
    print(folder)


def factorize_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr factorize``."""
    parser = new_parser(
        "factorize",
        prog,
        "Truncated SVDs, or with --calibration the factors that are best for the inputs which that "
        "text gives each layer.",
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="MODEL", help="the same as --model MODEL")
    add("--model", type=Path, help="folder with a dense transformers model")
    add("--output", type=Path, required=True, help="folder to write: new or empty")
    add("--rank", type=int, help="rank of every matrix")
    add("--rank_share", type=float, help="instead: rank relative to each matrix's smaller side")
    add("--targets", nargs="+", metavar="NAME", help="linear layers, e.g. q_proj (default: all)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: that of the model's files)",
    )
    add(
        "--calibration",
        nargs="+",
        metavar="DATA",
        help="a data folder, or files of text for the model's own tokenizer",
    )
    add(
        "--calibration_tokens",
        type=int,
        default=131_072,
        help="tokens to read of it (default: %(default)s)",
    )
    return parser


def factorize_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the factorized folder; print its size and errors."""
    arguments = parse(factorize_parser(prog), words)
    model = only_one("--model", arguments.model, arguments.folder)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from tqdm import tqdm

    from megalr.compression.calibration import CalibrationOptions
    from megalr.compression.compress import CompressionOptions, compress_folder

    targets = tuple(arguments.targets) if arguments.targets else None
    options = CompressionOptions(arguments.rank, arguments.rank_share, targets, arguments.dtype)
    text = None
    if arguments.calibration:
        text = CalibrationOptions(tuple(arguments.calibration), arguments.calibration_tokens)
    with tqdm(unit="block", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        outcome = compress_folder(model, arguments.output, options, text, show)
    for note in outcome.notes:
        print(f"note: {note}")
    before, after = outcome.numbers
    errors = outcome.errors.values()
    print(f"parameters: {after:,} instead of {before:,} ({after / before:.3f})")
    print(f"error of the matrices: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}")
    if outcome.perplexities is not None:
        dense, factorized = outcome.perplexities
        print(f"perplexity of text kept apart: {factorized:.3f}, of the dense model {dense:.3f}")
    print(f"written: {arguments.output}")
