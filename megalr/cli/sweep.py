"""``megalr sweep``: a base run and grids, on this machine or a cluster; CSV, table, figure."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.cli.command_line import FILES, LAUNCHERS, add_gpus, find_file, new_parser, parse_run
from megalr.cli.submit import slurm_template
from megalr.errors import UserError

if TYPE_CHECKING:
    from megalr.sweep.grid import PlannedRun
    from megalr.sweep.local import Planner
    from megalr.sweep.widening import Extensions


def sweep_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr sweep``."""
    parser = new_parser("sweep", prog, "The same command goes on where it was stopped.")
    add = parser.add_argument
    add(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML of the sweep (docs/sweeps.md), or the name of one of `megalr recipes`",
    )
    add("--output", type=Path, required=True, help="folder of the runs and results")
    add_gpus(parser, "all visible")
    add("--per_gpu", type=int, help="runs at a time on each GPU (default: 1)")
    add(
        "--only",
        action="append",
        metavar="GLOB",
        help="runs whose name matches, such as 'low_rank__*'; may be repeated",
    )
    add("--limit_minutes", type=float, help="stop cleanly after so long; the next call goes on")
    add("--start_minutes", type=float, help="start no run after so long; running ones finish")
    add("--retry_failed", action="store_true", help="run failed and diverged runs again")
    add("--extend", action="store_true", help="widen an axis whose best value is at its edge")
    add("--extend_limit", type=int, default=3, help="values added to one axis at most (default: 3)")
    add("--dry_run", action="store_true", help="check and list the runs, start none")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--slurm", action="store_true", help="submit a job array, a task per run")
    slurm.add_argument("--collect", action="store_true", help="only read what its tasks have left")
    slurm.add_argument("--time", help="time limit of one start of a run, D-HH:MM:SS")
    slurm.add_argument("--partition", help="partition (default: the cluster's)")
    slurm.add_argument("--account", help="account that is charged (default: yours)")
    slurm.add_argument("--cpus", type=int, help="processor cores of a run (default: the header's)")
    slurm.add_argument("--at_once", type=int, help="runs at a time (default: all)")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="of all runs; a file is the same as --config FILE",
    )
    return parser


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse values out of range, and options that would do nothing.

    Raises:
        UserError: names the option.
    """
    for name in ("limit_minutes", "start_minutes"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}: give more than 0")
    for name in ("extend_limit", "per_gpu", "cpus", "at_once"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more")
    local = ["gpus", "per_gpu", "limit_minutes", "start_minutes"]
    array = ["time", "partition", "account"]
    queued = arguments.slurm or arguments.collect
    for name in local if queued else [*array, "cpus", "at_once"]:
        if getattr(arguments, name) is not None:
            where = "with --slurm or --collect" if queued else "without --slurm"
            raise UserError(f"--{name} {where} has no effect: remove it")
    if queued and arguments.extend:
        raise UserError("--extend with --slurm or --collect: it waits for results; run it locally")
    if arguments.slurm and arguments.time is None:
        raise UserError("--slurm needs --time, the time limit of one start of a run")


def _planner(arguments: argparse.Namespace, file: Path) -> tuple[str, Planner]:
    """The sweep's name, and its runs as a function of the values that were added to axes."""
    from megalr.sweep.grid import Scope, plan_runs
    from megalr.sweep.selection import select
    from megalr.sweep.sweep_file import read_sweep_file

    sweep = read_sweep_file(file)
    folders = [Path(), file.parent, FILES]
    selected = select(sweep, folders)
    if selected is not None and arguments.extend:
        raise UserError("--extend with a sweep that has from: the settings are chosen already")

    def plan(extensions: Extensions) -> list[PlannedRun]:
        scope = Scope(arguments.overrides, extensions, selected)
        runs = plan_runs(sweep, folders, arguments.output, scope)
        if arguments.only is None:
            return runs
        chosen: set[str] = set()
        for pattern in arguments.only:
            matching = {run.name for run in runs if fnmatchcase(run.name, pattern)}
            if not matching:
                raise UserError(f"--only {pattern}: matches no run, such as {runs[0].name}")
            chosen |= matching
        return [run for run in runs if run.name in chosen]

    return sweep.name, plan


def sweep_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Plan, run what is not done yet, write the results.

    Returns:
        0: every chosen run has finished or diverged; 1: some failed; 75: some are to be done.
    """
    arguments = parse_run(sweep_parser(prog), words, bare_config=True)
    if len(arguments.config) != 1:
        raise UserError(f"--config names {len(arguments.config)} files: give one sweep")
    file = find_file(arguments.config[0], "sweep")
    _check_options(arguments)
    started = time.monotonic()
    environment = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for planning; runs get the environment
    from megalr.sweep.widening import read_extensions

    name, plan = _planner(arguments, file)
    if arguments.slurm or arguments.collect:
        return _queue(arguments, name, plan(read_extensions(arguments.output)))
    if arguments.dry_run:
        runs = plan(read_extensions(arguments.output))
        print("\n".join(run.name for run in runs))
        print(f"{len(runs)} runs", file=sys.stderr)
        return 0
    from megalr.sweep.local import LocalOptions, run_locally

    limit, last = arguments.limit_minutes, arguments.start_minutes
    options = LocalOptions(
        program=LAUNCHERS / "pretrain.py",
        environment=environment,
        gpus=arguments.gpus,
        per_gpu=arguments.per_gpu or 1,
        deadline=None if limit is None else started + 60 * limit,
        last_start=None if last is None else started + 60 * last,
        retry_failed=arguments.retry_failed,
        extend=arguments.extend_limit if arguments.extend else 0,
    )
    return run_locally(name, arguments.output, plan, options)


def _queue(arguments: argparse.Namespace, name: str, runs: list[PlannedRun]) -> int:
    """Submit the runs as a job array, or collect what it has left; the exit code."""
    from megalr.sweep.slurm import SlurmOptions, collect, submit_array

    if arguments.collect:
        return collect(name, arguments.output, runs)
    options = SlurmOptions(
        template=slurm_template(),
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        cpus=arguments.cpus,
        at_once=arguments.at_once,
        retry_failed=arguments.retry_failed,
        dry_run=arguments.dry_run,
    )
    return submit_array(name, arguments.output, runs, options)
