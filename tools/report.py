"""Compare runs: a page with final numbers, differing settings and curves, or the curves alone.

python tools/report.py runs/A runs/B --output report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalr.errors import UserError, exit_cleanly
from megalr.training.report import labelled, perplexity_change, read_run, write_html, write_png


def main() -> None:
    """Parse the command line, read the runs, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--output", type=Path, required=True, help="NAME.html (everything) or NAME.png (curves)"
    )
    arguments = parser.parse_args()
    writers = {".html": write_html, ".png": write_png}
    writer = writers.get(arguments.output.suffix)
    if writer is None:
        raise UserError(f"--output {arguments.output}: must end in {' or '.join(writers)}")
    runs = [read_run(folder) for folder in arguments.runs]
    writer(runs, arguments.output)
    for label, run in labelled(runs):
        print(f"{label}: {perplexity_change(run)}")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    exit_cleanly(main)
