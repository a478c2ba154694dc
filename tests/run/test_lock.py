"""One job at a time in a run's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalr.errors import AgreedError
from megalr.run import lock as run_lock
from megalr.run.folder import RUN_LOCK
from megalr.run.lock import run_folder_lock

HOLD = """
import sys
from pathlib import Path
from megalr.run.lock import run_folder_lock
with run_folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> subprocess.Popen[str]:
    folder = tmp_path_factory.mktemp("held") / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"SLURM_JOB_ID": "17"},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.folder = folder  # type: ignore[attr-defined]
    return process


def test_a_second_job_is_refused_and_a_requeued_one_waits_for_itself(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = holder.folder  # type: ignore[attr-defined]
    refused = f"run.dir {folder} is in use by another job: process {holder.pid} on .*SLURM job 17"
    with pytest.raises(AgreedError, match=refused), run_folder_lock(folder):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        holder.kill()  # the node with the job's former self is noticed to be gone
        holder.wait()

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    with run_folder_lock(folder):
        assert len(waits) == 1
        (folder / "config.yaml").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_folder_in_which_nothing_was_written_disappears(tmp_path: Path) -> None:
    with pytest.raises(ValueError), run_folder_lock(tmp_path / "run"):
        raise ValueError
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(AgreedError, match="cannot be written: Not a directory"):
        run_folder_lock(tmp_path / "file" / "run").__enter__()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / RUN_LOCK).symlink_to("/dev/full")
    with pytest.raises(AgreedError, match=f"run.dir {tmp_path} cannot be written"):
        run_folder_lock(tmp_path).__enter__()


def test_a_name_that_is_too_long_and_a_lock_file_of_bytes_are_no_tracebacks(tmp_path: Path) -> None:
    with (
        pytest.raises(AgreedError, match="cannot be written: File name too long"),
        run_folder_lock(tmp_path / ("x" * 300)),
    ):
        pass
    folder = tmp_path / ("x" * 240)
    folder.mkdir()
    (folder / RUN_LOCK).write_bytes(b"\xff\xfe")
    with run_folder_lock(folder):
        assert b"\xff" not in (folder / RUN_LOCK).read_bytes()
