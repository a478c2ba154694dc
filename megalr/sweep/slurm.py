"""A sweep as a SLURM job array: a task per run, with the batch script of a single run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.distributed.slurm_script import check_time, fill_header, submit_script
from megalr.errors import UserError
from megalr.files import disk_errors, read_json_object, write_atomic
from megalr.sweep.grid import PlannedRun
from megalr.sweep.local import output_lock, print_summary, write_results
from megalr.sweep.results import Results
from megalr.sweep.run_record import Attempt, RunRecord, current_record, last_line, read_record

JOB = "slurm.json"
"""The number of the array that was submitted last."""
TASKS = "slurm_tasks.sh"
"""A line of bash per task: its run's name and arguments."""
ENDS = "logs/slurm_ends"
"""A line per end of a task in its run's folder: exit code, seconds, job."""


@dataclass(frozen=True)
class SlurmOptions:
    """How a sweep is submitted.

    Attributes:
        template: text of launchers/slurm/pretrain.sbatch.
        time: limit of one start of a run.
        partition, account: of the array; None: the cluster's.
        cpus: processor cores of a run; None: the template's.
        at_once: tasks at a time; None: all.
        retry_failed: whether failed and diverged runs are run again.
        dry_run: print the script instead.
    """

    template: str
    time: str
    partition: str | None
    account: str | None
    cpus: int | None
    at_once: int | None
    retry_failed: bool
    dry_run: bool


def submit_array(name: str, output: Path, runs: Sequence[PlannedRun], options: SlurmOptions) -> int:
    """Submit the runs that are not done, one GPU each; the exit code.

    Raises:
        UserError: the array of an earlier call is still in the queue, sbatch refuses, or a run has
            started with other settings.
    """
    check_time(options.time)
    if options.dry_run:
        todo = _to_do(Results(name, output, runs), runs, options)
        print(array_script(name, output, len(todo), options), f"# {TASKS}:", sep="\n")
        print("\n".join(map(task_line, todo)))
        return 0
    with output_lock(output):
        _check_no_array_in_queue(output)
        results = _collected(name, output, runs)
        todo = _to_do(results, runs, options)
        print(f"{len(runs)} runs, {len(todo)} to do", flush=True)
        if not todo:
            return print_summary(results, runs)
        for run in todo:
            record = current_record(run.name, run.config, run.folder) or RunRecord({})
            record.config = run.config.model_dump(mode="json")
            with disk_errors(run.folder):
                (run.folder / "logs").mkdir(parents=True, exist_ok=True)
            record.save(run.folder)
        with disk_errors(output):
            (output / "slurm").mkdir(exist_ok=True)
        write_atomic(output / TASKS, "".join(f"{task_line(run)}\n" for run in todo).encode())
        answer = submit_script(array_script(name, output, len(todo), options), "--parsable")
        number = answer.strip().split(";")[0]
        write_atomic(output / JOB, (json.dumps({"job": number}) + "\n").encode())
    print(f"submitted: array {number}, {len(todo)} tasks; --collect reads their results")
    return 0


def _to_do(results: Results, runs: Sequence[PlannedRun], options: SlurmOptions) -> list[PlannedRun]:
    again = ("failed", "diverged") if options.retry_failed else ()
    return [run for run in runs if results.rows[run.name]["status"] in ("pending", *again)]


def collect(name: str, output: Path, runs: Sequence[PlannedRun]) -> int:
    """Read what the tasks have left and write the results; the exit code of the sweep."""
    with output_lock(output):
        return print_summary(_collected(name, output, runs), runs)


def array_script(name: str, output: Path, tasks: int, options: SlurmOptions) -> str:
    """The batch script of the array."""
    throttle = "" if options.at_once is None else f"%{options.at_once}"
    header = {
        "job-name": name,
        "array": f"0-{tasks - 1}{throttle}",
        "nodes": 1,
        "gpus-per-node": 1,
        "ntasks-per-node": 1,
        "cpus-per-task": options.cpus,
        "time": options.time,
        "output": output / "slurm" / "%A_%a.log",
        "partition": options.partition,
        "account": options.account,
    }
    tasks_file = shlex.quote(str(output / TASKS))
    head = [
        'cd "${SLURM_SUBMIT_DIR:-.}" || exit 2',
        f'eval "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {tasks_file})"  # SWEEP_RUN and the run',
        f"""trap 'echo "$? $SECONDS $SLURM_JOB_ID" >>"$SWEEP_RUN/{ENDS}"' EXIT""",
    ]
    return fill_header(options.template, header, head, {"job-name": "name of the sweep"})


def task_line(run: PlannedRun) -> str:
    """The line of bash that makes a task this run's."""
    return f"SWEEP_RUN={shlex.quote(str(run.folder))}; set -- {shlex.join(run.arguments)}"


def _collected(name: str, output: Path, runs: Sequence[PlannedRun]) -> Results:
    """The results, with the ends of tasks entered into the records."""
    for run in runs:
        current_record(run.name, run.config, run.folder)
        take_ends(run.folder)
    results = Results(name, output, runs)
    write_results(results)
    return results


def take_ends(folder: Path) -> None:
    """Move the ends that tasks have noted in a run's folder into its record."""
    ends, taken = folder / ENDS, folder / f"{ENDS}.taken"
    if ends.exists() and not taken.exists():
        os.replace(ends, taken)  # a task that ends now begins a new file
    record = read_record(folder)
    if record is None or not taken.exists():
        return
    for line in taken.read_text(encoding="utf-8").splitlines():
        code, seconds, job = line.split()
        text = last_line(folder / "logs" / job / "rank-0.log")
        record.attempts.append(Attempt(int(code), float(seconds), text))
    record.save(folder)
    taken.unlink()


def _check_no_array_in_queue(output: Path) -> None:
    """Refuse to submit runs twice."""
    if not (output / JOB).exists():
        return
    number = str(read_json_object(output / JOB).get("job"))
    try:
        done = subprocess.run(["squeue", "-h", "-j", number], capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"squeue cannot be run ({error.strerror}), so {number} may still be "
            "waiting: submit on a login node of the cluster"
        ) from error
    # A number that SLURM has forgotten is an error of squeue, and no longer in the queue.
    if done.returncode == 0 and done.stdout.strip():
        raise UserError(
            f"array {number} of this sweep is still in the queue: wait for it, or scancel {number}"
        )
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {' '.join(done.stderr.split())}: try again")
