"""Export a run's checkpoint as a folder that transformers loads.

python tools/export_hf.py runs/NAME --output out/ [--form factorized] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megalr.errors import exit_cleanly


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of the run")
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
    add("--max_shard_size", default="5GB", help="largest weight file (default: %(default)s)")
    add("--tokenizer", help="tokenizer to add, or none (default: that of the training data)")
    return parser.parse_args()


def main() -> None:
    """Parse the command line, export, print the result."""
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from megalr.hf.export_run import export_run

    checkpoint = export_run(
        arguments.run,
        arguments.tag,
        arguments.output,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.tokenizer,
        arguments.form,
    )
    facts = f"{checkpoint.folder.name}, {arguments.form}, {arguments.dtype}"
    print(f"written: {arguments.output} ({facts})")


if __name__ == "__main__":
    exit_cleanly(main)
