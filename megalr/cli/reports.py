"""``megalr report``: one page with plots, ranking, events and settings of runs; figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megalr.cli.command_line import new_parser, parse
from megalr.errors import UserError

ENDINGS = (".html", ".png", ".svg")
SHOWN_LINES = 20
"""Runs whose perplexity is printed."""


def report_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr report``."""
    parser = new_parser("report", prog)
    add = parser.add_argument
    add("folders", type=Path, nargs="*", metavar="RUN", help="the same as --run RUN ...")
    add(
        "--run",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="folders of runs, or folders above them",
    )
    add(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="NAME.html (everything), NAME.png or NAME.svg (loss and perplexity); report.html",
    )
    add("--figures", type=Path, metavar="FOLDER", help="also write every plot as PNG and SVG")
    return parser


def report_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the runs, write the report, print perplexities."""
    arguments = parse(report_parser(prog), words)
    runs = [*arguments.folders, *arguments.run]
    if not runs:
        raise UserError("--run is missing: give folders of runs, or folders above them")
    output = arguments.output
    if output.suffix not in ENDINGS:
        raise UserError(f"--output {output}: must end in {', '.join(ENDINGS)}")
    from megalr.report.collect import collect_runs, labelled
    from megalr.report.figures import write_figures, write_overview
    from megalr.report.page import write_page
    from megalr.run.metrics_reader import perplexity_change

    collected = collect_runs(runs)
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
