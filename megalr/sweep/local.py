"""A sweep on this machine: what is not done yet is run, and the results are kept up to date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.distributed.signals import STOPPED
from megalr.file_lock import JobLock
from megalr.files import disk_errors
from megalr.sweep.grid import PlannedRun
from megalr.sweep.live import LiveTable, best_rows, result_line
from megalr.sweep.results import Results
from megalr.sweep.run_record import current_record
from megalr.sweep.runner import Runner, machine_slots


@dataclass(frozen=True)
class LocalOptions:
    """How a sweep runs on this machine.

    Attributes:
        program: launchers/pretrain.py.
        gpus: as in CUDA_VISIBLE_DEVICES; None: all.
        per_gpu: runs at a time on each.
        deadline: of ``time.monotonic``; None: no limit.
        retry_failed: whether failed and diverged runs are run again.
    """

    program: Path
    gpus: Sequence[str] | None
    per_gpu: int
    deadline: float | None
    retry_failed: bool


def run_locally(name: str, output: Path, runs: Sequence[PlannedRun], options: LocalOptions) -> int:
    """Run the runs that are not done, writing the results after each.

    Returns:
        0: all finished or diverged; 1: some failed; STOPPED: some are still to be done.

    Raises:
        UserError: another sweep uses the folder, or a run has started with other settings.
    """
    slots = machine_slots(options.gpus, options.per_gpu)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = JobLock(output)
    try:
        for run in runs:
            current_record(run.name, run.config, run.folder)
        results = Results(name, output, runs)
        results.write()
        again = ("failed", "diverged") if options.retry_failed else ()
        todo = [run for run in runs if results.rows[run.name]["status"] in ("pending", *again)]
        table = LiveTable(results, len(todo), len(slots))
        print(f"{len(runs)} runs, {len(todo)} to do, {len(slots)} at a time", flush=True)

        def note(run: PlannedRun) -> None:
            row = results.update(run)
            results.write()
            table.end_of(row)

        stopped = Runner(options.program, slots, options.deadline, note, table.redraw).run(todo)
    finally:
        lock.release()
    return _close(results, runs, stopped)


def _close(results: Results, runs: Sequence[PlannedRun], stopped: str | None) -> int:
    """Print what came out; the exit code."""
    states = [results.rows[run.name]["status"] for run in runs]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(", ".join(f"{number} {state}" for state, number in counts.items()))
    for row in best_rows(results.rows.values()).values():
        print(f"best of {row['group']}: {result_line(row)}")
    if counts.get("pending"):
        print(f"stopped by {stopped}: the same command goes on" if stopped else "some were stopped")
        return STOPPED
    return 1 if counts.get("failed") else 0
