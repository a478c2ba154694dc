"""launchers/slurm/preprocess.sbatch: the tasks of an array together write the data set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.preprocessing.corpus import ROOT, prose, tiny_tokenizer, tool_environment, write_jsonl
from tests.preprocessing.test_job import contents, preprocess

SCRIPT = ROOT / "launchers" / "slurm" / "preprocess.sbatch"


def run_task(arguments: list[object], **slurm: object) -> subprocess.CompletedProcess[str]:
    environment = {**tool_environment(), "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT)}
    environment |= {key: str(value) for key, value in slurm.items()}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_an_array_writes_what_one_job_writes_and_its_last_task_the_manifest(
    tmp_path: Path,
) -> None:
    inputs = [write_jsonl(tmp_path / f"{n}.json.gz", prose(30, seed=n)) for n in range(5)]
    output = tmp_path / "data"
    arguments = ["--input", tmp_path / "*.json.gz", "--tokenizer", tiny_tokenizer()]
    arguments += ["--output", output]
    for task in range(3):
        assert not (output / "manifest.json").exists()
        done = run_task(
            arguments, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT=3, SLURM_CPUS_PER_TASK=1
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["complete"] == (task == 2)
    preprocess(inputs, tmp_path / "expected")
    assert contents(output) == contents(tmp_path / "expected")
    again = run_task(arguments, SLURM_ARRAY_TASK_ID=1, SLURM_ARRAY_TASK_COUNT=1, SHARES=3)
    assert json.loads(again.stdout)["reused"] == 2
    wrong = run_task(arguments, SLURM_ARRAY_TASK_ID=3, SLURM_ARRAY_TASK_COUNT=3)
    assert wrong.returncode == 2 and "--share is '3/3'" in wrong.stderr
