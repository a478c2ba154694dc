"""Add the runs of sweeps to the study's list, ``benchmarks/results/study/runs.csv``.

    python benchmarks/study/collect.py sweeps/table3_20m --study table3 --size 20M --per_gpu 4

A run that the list has already is replaced. Failed and diverged runs are in it like all others.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from megalr.errors import UserError, exit_cleanly
from megalr.sweep.results import RUNS_CSV, Row, read_csv, write_csv

LIST = Path(__file__).resolve().parents[1] / "results" / "study" / "runs.csv"
KEY = (
    *("study", "size", "group", "method", "optimizer", "precision", "restarts", "rank", "alpha"),
    *("lr", "lr_ratio_embedding", "lr_ratio_head", "adam_lr_ratio", "seed", "updates", "setting"),
)
"""Columns that tell runs apart."""

ADAM_BESIDE = ("muon", "normuon", "spectron")
"""Optimizers whose axis ``ratio`` is ``optimizer.adam_lr_ratio``."""

AXES_IN_COLUMNS = ("lr", "ratio", "alpha", "rank")
"""Axes whose values other columns hold; those of all others are in ``setting``."""

COLUMNS = (
    *KEY,
    *("tokens", "unique_tokens", "perplexity_c4", "perplexity_mix", "status", "error"),
    *("parameters", "weights_and_states_gib", "peak_memory_gib", "tokens_per_second"),
    *("gpu_seconds", "runs_per_gpu", "gpu", "commit"),
)
"""Columns of the list. Speeds are those of ``runs_per_gpu`` runs that share a GPU."""


def study_row(row: Row, given: argparse.Namespace) -> Row:
    """A row of a sweep as a row of the list."""
    adam = row.get("axis_ratio") if row["optimizer"] in ADAM_BESIDE else None
    named = {f"perplexity_{name}": row.get(f"perplexity_{name}") for name in ("c4", "mix")}
    if not any(named.values()):
        named["perplexity_c4"] = row["perplexity"]  # a single set has no name
    axes = {
        name.removeprefix("axis_"): value for name, value in row.items() if name.startswith("axis_")
    }
    further = [
        f"{name}={axes[name]}" for name in axes if name not in AXES_IN_COLUMNS and axes[name]
    ]
    return {
        **row,
        **named,
        "study": given.study,
        "size": given.size,
        "adam_lr_ratio": adam,
        "setting": " ".join(further),
        "runs_per_gpu": given.per_gpu,
        "commit": given.commit or row["version"],
    }


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Both, in this order; of two rows of the same run the new one."""
    rows = {tuple(_plain(row.get(name)) for name in KEY): row for row in (*old, *new)}
    return list(rows.values())


def _plain(value: str | float | None) -> str:
    """The same text for 4e-3 and 0.004."""
    try:
        return repr(float(value or ""))
    except ValueError:
        return str(value or "")


def main() -> None:
    """Read the sweeps, rewrite the list."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("sweeps", type=Path, nargs="+", help="output folders of tools/sweep.py, or their runs.csv")
    add("--study", required=True, help="what the runs are for, such as table3")
    add("--size", required=True, help="size of the models, such as 20M")
    add("--per_gpu", type=int, required=True, help="runs at a time on each GPU")
    add("--commit", help="commit of the package (default: what the runs recorded)")
    add("--list", type=Path, default=LIST, help="the list (default: benchmarks/results/study)")
    arguments = parser.parse_args()
    new: list[Row] = []
    for sweep in arguments.sweeps:
        rows = read_csv(sweep / RUNS_CSV if sweep.is_dir() else sweep)
        if not rows:
            raise UserError(f"{sweep}: no runs: give the output folder of a sweep")
        new += [study_row(row, arguments) for row in rows if row["status"] != "pending"]
    rows = merge(_listed(arguments.list), new)
    arguments.list.parent.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.list, COLUMNS, rows)
    print(f"{arguments.list.name}: {len(rows)} runs, {len(new)} read")


def _listed(path: Path) -> list[Row]:
    """The rows of the list; [] if there is none yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    exit_cleanly(main)
