"""Convert a checkpoint to DeepSpeed's universal layout: whole tensors, independent of ranks.

launchers/pretrain.py resumes on another number of ranks or ZeRO stage without it. The folder
``<checkpoint>_universal`` is self-contained and can be read by other programs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalr.errors import exit_cleanly


def main() -> None:
    """Parse, then write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run (runs/NAME)")
    parser.add_argument("--tag", help="the checkpoint, e.g. update_1000 (default: the newest)")
    arguments = parser.parse_args()
    from tqdm import tqdm

    from megalr.checkpoint import open_checkpoint
    from megalr.checkpoint.reshape import write_universal

    checkpoint = open_checkpoint(arguments.run, arguments.tag)
    with tqdm(unit="parameter", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = write_universal(checkpoint, show)
    print(folder)


if __name__ == "__main__":
    exit_cleanly(main)
