"""Run a sweep: a base run and grids, on the GPUs of this machine; results as CSV, table, figure.

python tools/sweep.py recipes/sweeps/quickstart.yaml --output sweeps/quickstart --per_gpu 2
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.errors import UserError, exit_cleanly

if TYPE_CHECKING:
    from megalr.sweep.grid import PlannedRun
    from megalr.sweep.local import Planner
    from megalr.sweep.widening import Extensions

PRETRAIN = Path(__file__).resolve().parents[1] / "launchers" / "pretrain.py"


def parse_arguments() -> argparse.Namespace:
    """The command line; positional arguments after the file are overrides of all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="FILE", help="YAML of the sweep (docs/sweeps.md)")
    add("--output", type=Path, required=True, help="folder of the runs and results")
    add("--gpus", metavar="0,1,...", help="GPUs to use (default: all that are visible)")
    add("--per_gpu", type=int, default=1, help="runs at a time on each GPU (default: 1)")
    add("--only", metavar="GLOB", help="runs whose name matches, such as 'low_rank__*'")
    add("--limit_minutes", type=float, help="stop cleanly after so long; the next call goes on")
    add("--retry_failed", action="store_true", help="run failed and diverged runs again")
    add("--extend", action="store_true", help="widen an axis whose best value is at its edge")
    add("--extend_limit", type=int, default=3, help="values added to one axis at most (default: 3)")
    add("--dry_run", action="store_true", help="check and list the runs, start none")
    add("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def planner(arguments: argparse.Namespace) -> tuple[str, Planner]:
    """The sweep's name, and its runs as a function of the values that were added to axes."""
    from megalr.sweep.grid import Scope, plan_runs
    from megalr.sweep.selection import select
    from megalr.sweep.sweep_file import read_sweep_file

    sweep = read_sweep_file(arguments.sweep)
    folders = [Path(), arguments.sweep.parent]
    selected = select(sweep, folders)
    if selected is not None and arguments.extend:
        raise UserError("--extend with a sweep that has from: the settings are chosen already")

    def plan(extensions: Extensions) -> list[PlannedRun]:
        scope = Scope(arguments.overrides, extensions, selected)
        runs = plan_runs(sweep, folders, arguments.output, scope)
        if arguments.only is None:
            return runs
        chosen = [run for run in runs if fnmatchcase(run.name, arguments.only)]
        if not chosen:
            raise UserError(f"--only {arguments.only}: matches no run, such as {runs[0].name}")
        return chosen

    return sweep.name, plan


def main() -> int:
    """Plan, run what is not done yet, write the results.

    Returns:
        0: every chosen run has finished or diverged; 1: some failed; 75: stopped before the end.
    """
    arguments = parse_arguments()
    if arguments.limit_minutes is not None and not arguments.limit_minutes > 0:
        raise UserError(f"--limit_minutes is {arguments.limit_minutes}: give more than 0")
    if arguments.extend_limit < 1:
        raise UserError(f"--extend_limit is {arguments.extend_limit}: give 1 or more")
    started = time.monotonic()
    environment = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for planning; runs get the environment
    from megalr.sweep.local import LocalOptions, run_locally
    from megalr.sweep.widening import read_extensions

    name, plan = planner(arguments)
    if arguments.dry_run:
        runs = plan(read_extensions(arguments.output))
        print("\n".join(run.name for run in runs))
        print(f"{len(runs)} runs", file=sys.stderr)
        return 0
    options = LocalOptions(
        program=PRETRAIN,
        environment=environment,
        gpus=arguments.gpus.split(",") if arguments.gpus else None,
        per_gpu=arguments.per_gpu,
        deadline=None
        if arguments.limit_minutes is None
        else started + 60 * arguments.limit_minutes,
        retry_failed=arguments.retry_failed,
        extend=arguments.extend_limit if arguments.extend else 0,
    )
    return run_locally(name, arguments.output, plan, options)


if __name__ == "__main__":
    exit_cleanly(main)
