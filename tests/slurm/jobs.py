"""Jobs of the tests: submitting the shipped script, and looking at what became of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.slurm.cluster import Cluster, wait_until
from tests.training.runs import settings

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "launchers" / "slurm" / "pretrain.sbatch"
DEADLINE = 600.0
"""Seconds that anything here may take on a busy machine."""


def job_environment(cluster: Cluster) -> dict[str, str]:
    """Environment of a submission: CPU training, none of a launcher's variables."""
    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launched}
    return {**kept, **cpu, "PATH": cluster.environment["PATH"], "SLURM_CONF": config_of(cluster)}


def config_of(cluster: Cluster) -> str:
    """Path of the cluster's configuration."""
    return cluster.environment["SLURM_CONF"]


def write_run(folder: Path, data: Path, **train: Any) -> Path:
    """A recipe in ``folder``, whose run lies in ``folder/run``; short enough for many starts."""
    folder.mkdir(parents=True, exist_ok=True)
    values = settings(
        folder / "run",
        data,
        train={"updates": 200, "micro_batch_size": 6, **train},
        schedule={"name": "constant"},  # so that a shorter run is the start of a longer one
        checkpoint={"every": 40},
        evaluation={"every": 0},
        run={"timeout_seconds": 60},
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Job:
    """A submitted job and its log."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self.log = cluster, number, log

    def text(self) -> str:
        """What the job's log holds."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def show(self, key: str) -> str:
        """A field of ``scontrol show job``."""
        fields = self.cluster.query("scontrol", "show", "job", "-o", self.number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)[key]

    def wait_for_state(self, *states: str) -> None:
        """Wait until the job is in one of these states."""
        wait_until(
            lambda: self.show("JobState") in states, DEADLINE, f"{self.number} {states}", self.tail
        )

    def wait_for_text(self, text: str) -> None:
        """Wait until the log holds this."""
        wait_until(lambda: text in self.text(), DEADLINE, repr(text), self.tail)

    def minutes_running(self) -> int:
        """Whole minutes since the job's start."""
        days, _, clock = self.show("RunTime").rpartition("-")
        hours, minutes, _ = map(int, clock.split(":"))
        return 1440 * int(days or 0) + 60 * hours + minutes

    def start_again_soon(self) -> None:
        """Start the requeued job without the two minutes that SLURM leaves after a requeue.

        Not at once: within a second of the end a node takes the new start for the old one, whose
        credential it has revoked.
        """
        self.wait_for_state("PENDING")
        self.cluster.query("scontrol", "update", f"jobid={self.number}", "StartTime=now+3")

    def tail(self) -> str:
        """The end of the log, for messages."""
        return self.text()[-4000:]


def submit(
    cluster: Cluster, folder: Path, options: list[str], script: Path, *arguments: object, **env: str
) -> Job:
    """sbatch; the log lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "job-%j.log"
    command = ["sbatch", "--parsable", f"--output={log}", *options, str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**job_environment(cluster), **env},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    return Job(cluster, number, folder / f"job-{number}.log")


def pretrain(
    cluster: Cluster,
    recipe: Path,
    nodes: list[str] | int,
    ranks: int,
    overrides: tuple[str, ...] = (),
    **env: str,
) -> Job:
    """Submit the shipped script with ``ranks`` per node, on these nodes or this number of them."""
    count = nodes if isinstance(nodes, int) else len(nodes)
    header = [f"--nodes={count}", "--cpus-per-task=1"]
    if not isinstance(nodes, int):
        header.append(f"--nodelist={','.join(nodes)}")
    header += [f"--{kind}-per-node={ranks}" for kind in ("ntasks", "gpus")]
    run = ["--config", recipe, *overrides]
    return submit(cluster, recipe.parent, header, PRETRAIN, *run, **env)


def wait_for_update(recipe: Path, update: int, job: Job) -> None:
    """Wait until the run has logged this update."""
    metrics = recipe.parent / "run" / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and f'"update": {update},' in metrics.read_text(),
        DEADLINE,
        f"update {update}",
        job.tail,
    )
