"""Report on runs: one page with interactive plots, ranking, events and settings; figures.

python tools/report.py runs/A runs/B --output report.html
python tools/report.py runs/sweep --output sweep.html --figures figures/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalr.errors import UserError, exit_cleanly
from megalr.report.collect import collect_runs, labelled
from megalr.report.figures import write_figures, write_overview
from megalr.report.page import write_page
from megalr.run.metrics_reader import perplexity_change

ENDINGS = (".html", ".png", ".svg")
SHOWN_LINES = 20
"""Runs whose perplexity is printed."""


def main() -> None:
    """Parse the command line, read the runs, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, or folders above them"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="NAME.html (everything), NAME.png or NAME.svg (loss and perplexity); report.html",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="also write every plot there as PNG and SVG"
    )
    arguments = parser.parse_args()
    output = arguments.output
    if output.suffix not in ENDINGS:
        raise UserError(f"--output {output}: must end in {', '.join(ENDINGS)}")
    collected = collect_runs(arguments.runs)
    for line in collected.unreadable:
        print(f"not shown: {line}")
    if output.suffix == ".html":
        write_page(collected, output)
    else:
        write_overview(collected.runs, output)
    written = [output]
    if arguments.figures is not None:
        written += write_figures(collected.runs, arguments.figures)
    for label, run in labelled(collected.runs)[:SHOWN_LINES]:
        print(f"{label}: {perplexity_change(run)}")
    if len(collected.runs) > SHOWN_LINES:
        print(f"and {len(collected.runs) - SHOWN_LINES} more runs")
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    exit_cleanly(main)
