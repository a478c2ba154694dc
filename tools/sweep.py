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

from megalr.errors import UserError, exit_cleanly

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
    add("--dry_run", action="store_true", help="check and list the runs, start none")
    add("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> int:
    """Plan, run what is not done yet, write the results.

    Returns:
        0: every chosen run has finished or diverged; 1: some failed; 75: stopped before the end.
    """
    arguments = parse_arguments()
    if arguments.limit_minutes is not None and not arguments.limit_minutes > 0:
        raise UserError(f"--limit_minutes is {arguments.limit_minutes}: give more than 0")
    started = time.monotonic()
    given = os.environ.get("DS_ACCELERATOR")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # planning needs no GPU; DeepSpeed would warn
    from megalr.sweep.grid import plan_runs
    from megalr.sweep.sweep_file import read_sweep_file

    sweep = read_sweep_file(arguments.sweep)
    folders = [Path(), arguments.sweep.parent]
    runs = plan_runs(sweep, folders, arguments.output, arguments.overrides)
    if given is None:
        del os.environ["DS_ACCELERATOR"]  # the runs choose for themselves
    if arguments.only is not None:
        names = [run.name for run in runs]
        runs = [run for run in runs if fnmatchcase(run.name, arguments.only)]
        if not runs:
            raise UserError(f"--only {arguments.only}: matches no run; the first is {names[0]}")
    if arguments.dry_run:
        for run in runs:
            print(run.name)
        print(f"{len(runs)} runs", file=sys.stderr)
        return 0
    from megalr.sweep.local import LocalOptions, run_locally

    options = LocalOptions(
        program=PRETRAIN,
        gpus=arguments.gpus.split(",") if arguments.gpus else None,
        per_gpu=arguments.per_gpu,
        deadline=None
        if arguments.limit_minutes is None
        else started + 60 * arguments.limit_minutes,
        retry_failed=arguments.retry_failed,
    )
    return run_locally(sweep.name, arguments.output, runs, options)


if __name__ == "__main__":
    exit_cleanly(main)
