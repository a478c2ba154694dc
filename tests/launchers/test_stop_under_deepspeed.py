"""SIGTERM to DeepSpeed's launcher: it signals one rank and would kill it 30 seconds later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.ranks import free_port
from tests.synthetic import write_dataset
from tests.training.runs import events, settings

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def test_the_run_has_saved_before_the_launcher_kills_it(tmp_path: Path) -> None:
    values = settings(
        tmp_path / "run",
        write_dataset(tmp_path / "data"),
        train={"updates": 100_000},
        evaluation={"every": 0},
        checkpoint={"every": 0},
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    command += [str(ROOT / "launchers" / "pretrain.py"), "--config", str(config)]
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    started: list[psutil.Process] = []
    try:
        _wait_for_steps(tmp_path / "run", 3, job)
        started = psutil.Process(job.pid).children(recursive=True)
        (launcher,) = [p for p in started if "deepspeed.launcher.launch" in p.cmdline()]
        launcher.send_signal(signal.SIGTERM)
        code = job.wait(100)
    finally:
        for process in started:
            if process.is_running():
                process.kill()
        job.kill()
    # The launcher says 1 when it was signalled; what the run did is in its metrics.
    assert code == 1
    assert events(tmp_path / "run", "end")[-1]["reason"] == "SIGTERM"
    (saved,) = events(tmp_path / "run", "checkpoint")
    assert saved["update"] == events(tmp_path / "run", "signal")[0]["update"]
    assert "Traceback" not in (tmp_path / "output").read_text()


def _wait_for_steps(folder: Path, count: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and job.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(events(folder, "step")) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"the run did not begin: {job.poll()}")
