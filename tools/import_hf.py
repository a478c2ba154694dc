"""Approximation error of a pretrained model's matrices for a method, by rank.

python tools/import_hf.py models/llama-2-7b --method low_rank --rank 128 256 512
python tools/import_hf.py models/llama-2-7b --method sltrain --rank 128 --density 0.03
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
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="FOLDER", help="folder with a transformers model")
    add("--method", choices=("low_rank", "sltrain"), default="low_rank")
    add("--rank", type=int, nargs="+", required=True, help="ranks to try")
    add("--density", type=float, default=0.01, help="of sltrain (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Parse the command line, factorize without saving, print a table."""
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from megalr.hf.init_from_pretrained import trial_import

    print("|W - W_model| / |W|, mean over the layers (largest)")
    for rank in arguments.rank:
        density = arguments.density if arguments.method == "sltrain" else None
        errors = trial_import(arguments.model, rank, density).by_projection()
        cells = (f"{name} {mean:.3f} ({most:.3f})" for name, (mean, most) in errors.items())
        print(f"rank {rank}:  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
