"""tools/sweep.py --slurm on a real SLURM: an array of two runs that finish and one that cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalr.sweep.results import read_csv
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import DEADLINE, ROOT, job_environment
from tests.sweep.files import write_sweep

pytestmark = pytest.mark.long


def test_an_array_runs_what_is_not_done_and_its_results_are_collected(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    axes = {"lr": {"key": "optimizer.lr", "values": [0.01, 0.02]}}
    groups = {"good": {"axes": axes}, "bad": {"set": ["model.vocab_size=64"]}}
    path = write_sweep(tmp_path, set=[f"data.train={data}"], groups=groups)

    def sweep(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/sweep.py", str(path), "--output", str(tmp_path / "out")]
        environment = job_environment(cluster)
        return subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    submit = ("--slurm", "--time", "0:10:00", "--partition", "low", "--cpus", "1", "--at_once", "2")
    done = sweep(*submit)
    assert done.returncode == 0, done.stderr
    assert "3 runs, 3 to do\nsubmitted: array" in done.stdout
    again = sweep(*submit)
    assert again.returncode == 2 and "is still in the queue: wait for it" in again.stderr
    number = done.stdout.split("array ")[1].split(",")[0]

    def states() -> dict[str, str]:
        lines = cluster.query("squeue", "-h", "-t", "all", "-r", "-j", number, "-o", "%K %T")
        return dict(line.split() for line in lines.splitlines())

    logs = tmp_path / "out" / "slurm"
    wait_until(
        lambda: states() == {"0": "COMPLETED", "1": "COMPLETED", "2": "FAILED"},
        DEADLINE,
        "the array's end",
        lambda: "\n".join(log.read_text()[-2000:] for log in logs.glob("*.log")),
    )
    assert sweep("--collect").returncode == 1
    rows = {row["run"]: row for row in read_csv(tmp_path / "out" / "runs.csv")}
    assert [row["status"] for row in rows.values()] == ["finished", "finished", "failed"]
    assert all(float(row["perplexity"]) > 1 and row["seconds"] for row in list(rows.values())[:2])
    assert "64" in rows["bad__seed=7"]["error"]
