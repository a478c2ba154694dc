"""The command lines of export and evaluation, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.data import write_data
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero

ROOT = Path(__file__).resolve().parents[2]


def _start(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR")
    return subprocess.run(
        [sys.executable, str(ROOT / program), *map(str, arguments)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in left_out} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates."""
    home = tmp_path_factory.mktemp("run")
    data = write_data(home / "data")
    short = {"train": {"updates": 2}, "schedule": {"warmup_updates": 0}}
    run_distributed(run, 1, settings(home / "run", data, **short), zero(1))
    return home / "run"


@pytest.mark.long
@pytest.mark.parametrize("form", ["dense", "factorized"])
def test_a_run_is_exported_and_the_model_evaluated(form: str, folder: Path, tmp_path: Path) -> None:
    done = _start("tools/export_hf.py", folder, "--output", tmp_path / "out", "--form", form)
    assert done.returncode == 0, done.stderr
    last = f"written: {tmp_path / 'out'} (update_2, {form}, float32)"
    assert done.stdout.splitlines()[-1] == last
    data = folder.parent / "data"
    # In two processes: the loss does not depend on their number.
    words = ["--model", tmp_path / "out", "--data", data, "--gpus", 1 if form == "dense" else 2]
    done = _start("launchers/evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # and nothing else
    assert found["ranks"] == words[-1]
    (expected,) = events(folder, "eval")
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert f"perplexity {found['perplexity']:.4f}" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "out", "--micro_batch_size", "0"], "evaluate.py: error: argument --micro"),
        (["--model", "out", "--tag", "update_2"], "error: --tag update_2 belongs to --run"),
        (["--model", "out", "--tasks", "piqa", "--gpus", "2"], "error: --gpus with --tasks has no"),
        (["--run", "runs/a", "--tasks", "piqa"], "error: --tasks needs --model: export the run"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = _start("launchers/evaluate.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)
