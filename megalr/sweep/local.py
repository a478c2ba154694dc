"""A sweep on this machine: what is not done yet is run, and the results are kept up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megalr.distributed.signals import STOPPED
from megalr.errors import UserError
from megalr.file_lock import JobLock
from megalr.files import disk_errors
from megalr.sweep.figure import write_figure
from megalr.sweep.grid import PlannedRun
from megalr.sweep.live import LiveTable, best_rows, result_line
from megalr.sweep.results import Results
from megalr.sweep.run_record import current_record
from megalr.sweep.runner import Runner, machine_slots
from megalr.sweep.summary import write_table
from megalr.sweep.sweep_file import many_problems
from megalr.sweep.widening import Extensions, read_extensions, widen, write_extensions

Planner = Callable[[Extensions], list[PlannedRun]]


@dataclass(frozen=True)
class LocalOptions:
    """How a sweep runs on this machine.

    Attributes:
        program: launchers/pretrain.py.
        environment: of the runs.
        gpus: how many, or which as in CUDA_VISIBLE_DEVICES; None: all.
        per_gpu: runs at a time on each.
        deadline, last_start: as in Runner; None: no limit.
        retry_failed: whether failed and diverged runs are run again.
        extend: values that may be added to an axis whose best one lies at its edge.
    """

    program: Path
    environment: Mapping[str, str]
    gpus: int | Sequence[str] | None
    per_gpu: int
    deadline: float | None
    last_start: float | None
    retry_failed: bool
    extend: int = 0


def run_locally(name: str, output: Path, plan: Planner, options: LocalOptions) -> int:
    """Run what is not done, writing the results after each run; then widen axes and go on.

    Args:
        name: of the sweep.
        output: its folder.
        plan: the runs, given the values that were added to axes.
        options: how.

    Returns:
        0: all finished or diverged; 1: some failed; STOPPED: some are still to be done.

    Raises:
        UserError: another sweep uses the folder, data are missing, or a run has started with other
            settings.
    """
    extensions = read_extensions(output)
    runs = plan(extensions)
    check_data(runs)
    with output_lock(output):
        while True:
            results = Results(name, output, runs)
            code = _run_pending(results, runs, options)
            options = replace(options, retry_failed=False)
            if code == STOPPED or not options.extend:
                return code
            rows = [results.rows[run.name] for run in runs]
            wider, notes = widen(rows, extensions, options.extend, lambda e: _reason(plan, e))
            print("\n".join(notes), flush=True)
            if wider == extensions:
                return code
            write_extensions(output, wider)
            extensions, runs = wider, plan(wider)


def check_data(runs: Sequence[PlannedRun]) -> None:
    """Refuse a sweep whose runs would fail one after the other for want of their data.

    Raises:
        UserError: a line for each folder that is missing.
    """
    named: dict[str, str] = {}
    for run in runs:
        data = run.config.data
        paths = [source.path for source in data.train]
        for path in (*paths, *(path for s in data.validation_sets.values() for path in s)):
            named.setdefault(path, run.name)
    missing = [
        f"{path}: no such folder of data ({run} needs it)"
        for path, run in named.items()
        if not Path(path).is_dir()
    ]
    if missing:
        raise UserError(many_problems(missing, "the data of the sweep"))


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Make the folder of a sweep and keep other sweeps out of it.

    Raises:
        UserError: another process writes there; names it.
    """
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = JobLock(output)
    try:
        yield
    finally:
        lock.release()


def write_results(results: Results) -> None:
    """Write both CSV files and the table."""
    results.write()
    write_table(results.rows.values(), results.output)


def print_summary(results: Results, runs: Sequence[PlannedRun]) -> int:
    """Draw the figure, print what came out; the exit code as :func:`run_locally`."""
    write_figure(results.rows.values(), results.output)
    states = [results.rows[run.name]["status"] for run in runs]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(", ".join(f"{number} {state}" for state, number in counts.items()))
    for row in best_rows(results.rows.values()).values():
        print(f"best of {row['group']}: {result_line(row)}", flush=True)
    if counts.get("pending"):
        return STOPPED
    return 1 if counts.get("failed") else 0


def _reason(plan: Planner, extensions: Extensions) -> str | None:
    try:
        plan(extensions)
    except UserError as error:
        return str(error)
    return None


def _run_pending(results: Results, runs: Sequence[PlannedRun], options: LocalOptions) -> int:
    """One pass over the runs; the exit code."""
    slots = machine_slots(options.gpus, options.per_gpu)
    for run in runs:
        current_record(run.name, run.config, run.folder)
    write_results(results)
    again = ("failed", "diverged") if options.retry_failed else ()
    todo = [run for run in runs if results.rows[run.name]["status"] in ("pending", *again)]
    table = LiveTable(results, len(todo), len(slots))
    gpus = ", ".join(dict.fromkeys(slot.gpu for slot in slots if slot.gpu is not None))
    where = f" on GPU {gpus}" if gpus else ""
    print(f"{len(runs)} runs, {len(todo)} to do, {len(slots)} at a time{where}", flush=True)

    def note(run: PlannedRun) -> None:
        row = results.update(run)
        write_results(results)
        table.end_of(row)

    runner = Runner(
        options.program,
        options.environment,
        slots,
        options.deadline,
        options.last_start,
        note,
        table.redraw,
    )
    stopped = runner.run(todo)
    code = print_summary(results, runs)
    if stopped is not None and code == STOPPED:
        print(f"stopped by {stopped}: the same command goes on", flush=True)
    return code
