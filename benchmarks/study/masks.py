"""Perplexity of runs with document masks and without, of the last checkpoints, as CSV and Markdown.

    python benchmarks/study/masks.py sweeps/document_mask_20m/runs/* --csv TABLE.csv

A run's own evaluation has the masks of its training, so two runs that differ in them are not
compared by it. Here every run is evaluated on all targets of each folder of data, in windows of its
own length, in both ways:

* without masks: a target sees its window, documents before its own included;
* with masks: a target sees its document within the window; first tokens of documents are none.

Numbers of one way and one length compare runs; those of the two ways are of other targets. The
table has mean and standard deviation over seeds. Runs that the CSV has already are not repeated.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from seeds import mean_of

from megalr.distributed.process_group import start_distributed
from megalr.errors import UserError, exit_cleanly
from megalr.evaluation.offline import Request, evaluate_run
from megalr.sweep.results import Row, read_csv, write_csv

WAYS = {"without masks": False, "with masks": True}
SEED = re.compile(r"__seed=\d+$")


def row_of_run(run: Path, folders: list[Path], device: torch.device) -> Row:
    """Name of the run, and perplexity and number of targets by folder and way.

    Raises:
        UserError: no checkpoint that can be read, or data that do not fit it.
    """
    row: Row = {"run": run.name}
    for folder in folders:
        for way, mask in WAYS.items():
            request = Request(data=(str(folder),), document_mask=mask, tokens=0)
            found = evaluate_run(run, None, request, device)
            row[f"{folder.name} {way}"] = found["perplexity"]
            row[f"{folder.name} {way}, targets"] = found["tokens"]
    return row


def columns(folders: list[Path]) -> list[str]:
    """Those of the table that hold perplexities."""
    return [f"{folder.name} {way}" for folder in folders for way in WAYS]


def table(rows: list[Row], folders: list[Path]) -> str:
    """A line per setting, that is the name of a run without its seed."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(SEED.sub("", row["run"]), []).append({**row, "status": "finished"})
    lines = [["setting", *columns(folders), "runs"], ["---"] * (len(folders) * len(WAYS) + 2)]
    for name, own in settings.items():
        lines.append([name, *(mean_of(own, c)[1] for c in columns(folders)), str(len(own))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Evaluate the runs, write the list, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with a checkpoint")
    parser.add_argument("--csv", type=Path, required=True, help="list to write, or to go on with")
    parser.add_argument("--data", type=Path, nargs="+", help="folders of validation documents",
                        default=[Path("data/study/c4"), Path("data/study/mix")])  # fmt: skip
    arguments = parser.parse_args()
    folders = [folder.absolute() for folder in arguments.data]
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"--data {arguments.data}: two folders have the same name; name one anew")
    rows = read_csv(arguments.csv)
    known = {row["run"] for row in rows if all(row.get(column) for column in columns(folders))}
    device = start_distributed()
    for run in (run.resolve() for run in arguments.runs if run.name not in known):
        rows = [row for row in rows if row["run"] != run.name]
        rows.append(row_of_run(run, folders, device))
        write_csv(arguments.csv, tuple(dict.fromkeys(key for row in rows for key in row)), rows)
    print(table(rows, folders))


if __name__ == "__main__":
    exit_cleanly(main)
