"""Collect English prose from installed Python packages as C4-format shards.

python tools/gather_docs.py --output quickstart/text
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

from megalr.data.docstrings import gather
from megalr.errors import UserError, exit_cleanly


def main() -> None:
    """Parse the command line, gather, say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--packages",
        type=Path,
        nargs="+",
        default=[Path(sysconfig.get_path("purelib"))],
        help="folders to search (default: the packages of this interpreter)",
    )
    parser.add_argument("--shards", type=int, default=4, help="training shards (default 4)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args()
    for name in ("shards", "workers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    found = gather(
        arguments.packages, arguments.output, shards=arguments.shards, workers=arguments.workers
    )
    print(
        f"{found.train_documents} documents ({found.train_characters / 1e6:.1f} M characters) for "
        f"training, {found.validation_documents} ({found.validation_characters / 1e6:.1f} M) held "
        f"out, in {found.folder}"
    )


if __name__ == "__main__":
    exit_cleanly(main)
