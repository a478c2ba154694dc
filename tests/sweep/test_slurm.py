"""The job array of a sweep: what bash makes of its script, and what its tasks leave behind."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.sweep.results import Results
from megalr.sweep.run_record import RunRecord, read_record
from megalr.sweep.slurm import SlurmOptions, array_script, submit_array, take_ends, task_line
from tests.sweep.files import plan, rates, write_sweep

TEMPLATE = (Path(__file__).parents[2] / "launchers" / "slurm" / "pretrain.sbatch").read_text()


def options(**changed: Any) -> SlurmOptions:
    values = {"time": "1:00:00", "partition": "gpu", "account": None, "cpus": 4, "at_once": 3}
    fixed = {"retry_failed": False, "dry_run": False}
    return SlurmOptions(template=TEMPLATE, **{**values, **fixed, **changed})


def test_every_task_of_the_array_has_the_arguments_of_its_run(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "my sweep's", set=["log.wandb_project='a b'"], groups=rates(1, 2))
    runs = plan(path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    lines = "".join(f"{task_line(run)}\n" for run in runs)
    (tmp_path / "out" / "slurm_tasks.sh").write_text(lines, encoding="utf-8")
    script = array_script("tiny", tmp_path / "out", len(runs), options())
    header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for option in ("array=0-1%3", "nodes=1", "gpus-per-node=1", "cpus-per-task=4", "partition=gpu"):
        assert f"#SBATCH --{option}" in header
    head = script.split("PYTHON=")[0]
    for number, run in enumerate(runs):
        (run.folder / "logs").mkdir(parents=True)
        shown = f"{head}\nprintf '%s\\n' \"$@\"\nexit {2 * number}\n"
        environment = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "17", "PATH": "/bin"}
        done = subprocess.run(
            ["bash", "-c", shown], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert done.stdout.splitlines() == run.arguments and done.returncode == 2 * number
        assert (run.folder / "logs" / "slurm_ends").read_text() == f"{2 * number} 0 17\n"


def test_ends_of_tasks_become_attempts_once(tmp_path: Path) -> None:
    (run,) = plan(write_sweep(tmp_path, groups={"g": {}}), tmp_path / "out")
    logs = run.folder / "logs"
    (logs / "17").mkdir(parents=True)
    (logs / "17" / "rank-0.log").write_text("[x]\nerror: no luck\n", encoding="utf-8")
    RunRecord(run.config.model_dump(mode="json")).save(run.folder)
    for ends, status in (("75 100 17\n143 5 17\n", "pending"), ("2 7 17\n", "failed")):
        (logs / "slurm_ends").write_text(ends, encoding="utf-8")
        take_ends(run.folder)
        take_ends(run.folder)
        row = Results("tiny", tmp_path / "out", [run]).rows[run.name]
        assert row["status"] == status
    record = read_record(run.folder)
    assert record is not None and [attempt.code for attempt in record.attempts] == [75, 143, 2]
    assert row["error"] == "no luck" and row["seconds"] == 112


def test_an_array_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan(write_sweep(tmp_path, groups=rates(1)), tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    for changed, message in (
        ({"time": "soon"}, "--time is 'soon': give D-HH:MM:SS"),
        ({"partition": "a b"}, "--partition is 'a b': SLURM takes one word"),
        ({}, "sbatch is not on PATH"),
    ):
        with pytest.raises(UserError, match=message):
            submit_array("tiny", tmp_path / "out", runs, options(**changed))
    (tmp_path / "out" / "slurm.json").write_text('{"job": "17"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"squeue cannot be run .* so 17 may still be waiting"):
        submit_array("tiny", tmp_path / "out", runs, options())


def test_a_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = plan(write_sweep(tmp_path, groups=rates(1, 2)), tmp_path / "out")
    assert submit_array("tiny", tmp_path / "out", runs, options(dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n") and "#SBATCH --array=0-1%3\n" in shown
    assert shown.endswith(f"{task_line(runs[0])}\n{task_line(runs[1])}\n")
    assert not (tmp_path / "out").exists()
