"""launchers/slurm/preprocess.sbatch as an array on a real SLURM, one task of it killed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.preprocessing.corpus import prose, tiny_tokenizer, write_jsonl
from tests.preprocessing.test_job import contents, preprocess
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import DEADLINE, ROOT, submit

pytestmark = pytest.mark.long

SCRIPT = ROOT / "launchers" / "slurm" / "preprocess.sbatch"


def workers_of(task: str) -> list[int]:
    """Processes of an array's task that run the tool."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes come and go
            variables = (process / "environ").read_bytes().split(b"\0")
            arguments = (process / "cmdline").read_bytes()
            if (
                f"SLURM_ARRAY_TASK_ID={task}".encode() in variables
                and b"preprocess_c4" in arguments
            ):
                found.append(int(process.name))
    return found


def test_a_killed_task_is_done_again_and_the_data_are_the_same(
    cluster: Cluster, tmp_path: Path
) -> None:
    inputs = [write_jsonl(tmp_path / f"{n}.json.gz", prose(400, seed=n)) for n in range(4)]
    output = tmp_path / "data"
    options = ["--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=100", "--no-requeue"]
    arguments = ["--input", *inputs, "--tokenizer", tiny_tokenizer(), "--output", output]
    job = submit(cluster, tmp_path, options, SCRIPT, *arguments)
    wait_until(lambda: bool(workers_of("1")), DEADLINE, "a process of task 1")
    for process in workers_of("1"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def states() -> dict[str, str]:
        lines = cluster.query("squeue", "-h", "-t", "all", "-r", "-j", job.number, "-o", "%K %T")
        return dict(line.split() for line in lines.splitlines())

    wait_until(lambda: states() == {"0": "COMPLETED", "1": "FAILED"}, DEADLINE, "the array's end")
    assert not (output / "manifest.json").exists()
    again = submit(cluster, tmp_path, ["--array=1", *options[1:]], SCRIPT, *arguments, SHARES="2")
    again.wait_for_state("COMPLETED")
    preprocess(inputs, tmp_path / "expected")
    assert contents(output) == contents(tmp_path / "expected")
