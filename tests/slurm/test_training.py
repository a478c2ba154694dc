"""launchers/slurm/pretrain.sbatch on a real SLURM: preempted, out of time, node lost, cancelled.

Every node is this machine, so a job of two nodes is two steps' processes that meet over the
network; the losses must be those of an unbroken job on one node, to the last bit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import (
    DEADLINE,
    ROOT,
    Job,
    job_environment,
    pretrain,
    submit,
    wait_for_update,
    write_run,
)
from tests.training.runs import events, losses

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def endless(
    cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, Path]:
    """A job that never finishes; the others come first on the processor."""
    folder = tmp_path_factory.mktemp("endless")
    recipe = write_run(folder, data, updates=1_000_000)
    polite = write_program(folder / "python", f'exec nice -n 10 {sys.executable} "$@"')
    return pretrain(cluster, recipe, ["127.0.0.4"], 1, PYTHON=str(polite)), recipe


@pytest.fixture(scope="module")
def reference(
    cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, Path]:
    """The unbroken run: two ranks on one node."""
    recipe = write_run(tmp_path_factory.mktemp("reference"), data)
    return pretrain(cluster, recipe, ["127.0.0.4"], 2), recipe


def write_program(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def expected(reference: tuple[Job, Path]) -> list[float]:
    job, recipe = reference
    job.wait_for_state("COMPLETED")
    found = losses(recipe.parent / "run")
    assert len(found) == 200
    return found


def test_a_preempted_job_of_two_nodes_goes_on_exactly(
    cluster: Cluster, data: Path, reference: tuple[Job, Path], tmp_path: Path
) -> None:
    recipe = write_run(tmp_path, data)
    job = pretrain(cluster, recipe, ["127.0.0.2", "127.0.0.3"], 1)
    wait_for_update(recipe, 50, job)
    options = ["--partition=high", "--nodelist=127.0.0.3", "--gpus-per-node=2", "--ntasks=1"]
    urgent = submit(cluster, tmp_path, options, write_program(tmp_path / "urgent.sh", "hostname"))
    urgent.wait_for_state("COMPLETED")
    job.start_again_soon()
    job.wait_for_state("COMPLETED")
    starts = [event["update"] for event in events(recipe.parent / "run", "start")]
    assert starts[0] == 0 and 50 <= starts[1] < 200  # from the checkpoint made on the stop request
    assert losses(recipe.parent / "run") == expected(reference)
    report = [line for line in job.text().splitlines() if line.startswith("[environment]")]
    assert "ranks 2 on 2 hosts: 127.0.0.2 (ranks 0: 1 x" in report[1]
    assert "SLURM job" in report[2] and "(requeued 0 times)" in report[2]


def test_a_dead_node_is_replaced_and_the_run_goes_on_exactly(
    cluster: Cluster, data: Path, reference: tuple[Job, Path], tmp_path: Path
) -> None:
    recipe = write_run(tmp_path, data)
    job = pretrain(cluster, recipe, 2, 1)
    wait_for_update(recipe, 50, job)
    lost = cluster.query("scontrol", "show", "hostnames", job.show("NodeList")).split()[1]
    cluster.kill_node(lost)
    wait_until(lambda: job.show("Restarts") == "1", DEADLINE, "requeued", job.tail)
    job.start_again_soon()
    job.wait_for_state("COMPLETED")
    assert lost not in cluster.query("scontrol", "show", "hostnames", job.show("NodeList")).split()
    cluster.start_node(lost)
    starts = [event["update"] for event in events(recipe.parent / "run", "start")]
    assert len(starts) == 2 and starts[1] % 40 == 0 and starts[1] > 0
    assert losses(recipe.parent / "run") == expected(reference)


def test_submit_fills_the_header_and_torchrun_trains_the_same_run(
    cluster: Cluster,
    data: Path,
    reference: tuple[Job, Path],
    endless: tuple[Job, Path],  # it may start meanwhile
    tmp_path: Path,
) -> None:
    recipe = write_run(tmp_path, data)
    command = [sys.executable, "launchers/submit.py", str(recipe), "--nodes", "2", "--gpus", "1"]
    command += ["--time", "0:10:00", "--cpus", "1", "--partition", "low", "--launch", "torchrun"]
    command += ["--log", str(tmp_path / "job-%j.log"), "train.updates=12"]
    done = subprocess.run(
        command, cwd=ROOT, env=job_environment(cluster), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[-1]
    job = Job(cluster, number, tmp_path / f"job-{number}.log")
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.show("ExitCode") == "0:0", job.tail()
    assert losses(tmp_path / "run") == expected(reference)[:12]


def test_a_second_job_on_the_folder_of_a_running_one_is_refused(
    cluster: Cluster, endless: tuple[Job, Path]
) -> None:
    job, recipe = endless
    wait_for_update(recipe, 3, job)
    second = pretrain(cluster, recipe, ["127.0.0.2"], 1)
    second.wait_for_state("FAILED")
    assert second.show("ExitCode") == "2:0" and second.show("Restarts") == "0"
    (line,) = [line for line in second.text().splitlines() if line.startswith("error:")]
    assert f"run.dir {recipe.parent / 'run'} is in use by another job" in line
    assert f"SLURM job {job.number}" in line
    assert job.show("JobState") == "RUNNING"


def test_at_the_time_limit_it_saves_and_requeues_itself_and_scancel_ends_it(
    cluster: Cluster, endless: tuple[Job, Path]
) -> None:
    job, recipe = endless
    run = recipe.parent / "run"
    # SLURM signals up to a minute before the set time (300 s, in the script): at its next look.
    limit = job.minutes_running() + 5
    cluster.query("scontrol", "update", f"jobid={job.number}", f"TimeLimit={limit}")
    job.wait_for_text("the time limit is near: the run saves and stops")
    job.wait_for_text("stopped at the time limit: requeued; it goes on from ")
    stopped = events(run, "end")[-1]
    assert f"requeued; it goes on from update_{stopped['update']}\n" in job.text()
    assert stopped["reason"] == "stop_file" and not (run / "stop").exists()
    cluster.query("scontrol", "update", f"jobid={job.number}", "TimeLimit=60")
    job.start_again_soon()
    wait_until(lambda: len(events(run, "resume")) == 1, DEADLINE, "second start", job.tail)
    assert events(run, "start")[1]["update"] == stopped["update"]

    cluster.query("scancel", job.number)
    wait_until(lambda: len(events(run, "end")) == 2, DEADLINE, "second end", job.tail)
    assert events(run, "end")[1]["reason"] == "SIGTERM"
    job.wait_for_state("CANCELLED")
    assert job.show("Restarts") == "1"


def test_a_run_that_fails_twice_at_the_same_place_is_not_requeued_again(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    recipe = write_run(tmp_path, data)
    broken = write_program(
        tmp_path / "python",
        f'case "$* " in *--print_config*|"-c "*) exec {sys.executable} "$@" ;; esac\nexit 1',
    )
    job = pretrain(cluster, recipe, ["127.0.0.2"], 1, PYTHON=str(broken))
    job.wait_for_text("failed with exit code 1: requeued; it goes on from the beginning")
    job.start_again_soon()
    job.wait_for_state("FAILED")
    assert "no checkpoint since the last requeue: not requeued (exit code 1)" in job.text()
    assert job.show("Restarts") == "1"

    mistaken = pretrain(cluster, recipe, ["127.0.0.2"], 1, ("train.updatse=5",))
    mistaken.wait_for_state("FAILED")
    assert mistaken.show("ExitCode") == "2:0"
    assert "train.updatse = 5: unknown key; did you mean train.updates?" in mistaken.text()
