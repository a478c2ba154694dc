"""Runs as processes: what is repeated, what goes on, what is kept; with a stand-in for training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from megalr.errors import UserError
from megalr.sweep.local import LocalOptions, run_locally
from megalr.sweep.results import read_csv
from megalr.sweep.run_record import read_record
from megalr.sweep.runner import machine_slots
from tests.sweep.files import plan, rates, stand_in, write_sweep


def sweep(folder: Path, path: Path, options: LocalOptions, **scope: Any) -> int:
    return run_locally("tiny", folder, lambda e: plan(path, folder, extensions=e, **scope), options)


def statuses(folder: Path) -> dict[str, str]:
    rows = read_csv(folder / "runs.csv")
    return {row["axis_lr"]: row["status"] for row in rows}


def starts(folder: Path) -> Counter[str]:
    """Attempts by learning rate."""
    counts: Counter[str] = Counter()
    for path in (folder / "runs").iterdir():
        record = read_record(path)
        assert record is not None
        counts[path.name.split("__")[1]] = len(record.attempts)
    return counts


def test_finished_runs_are_not_repeated_killed_ones_go_on_and_failed_ones_are_kept(
    tmp_path: Path,
) -> None:
    path, out = write_sweep(tmp_path, groups=rates(1, 2, 3, 4, 5)), tmp_path / "out"
    assert sweep(out, path, stand_in(tmp_path)) == 75  # one was killed
    expected = {"1": "finished", "2": "finished", "3": "failed", "4": "pending", "5": "diverged"}
    assert statuses(out) == expected
    errors = {row["axis_lr"]: row["error"] for row in read_csv(out / "runs.csv")}
    assert errors["3"] == "no luck with 3" and errors["4"] == ""
    assert errors["5"] == "10 updates in a row were skipped"
    assert sweep(out, path, stand_in(tmp_path)) == 1
    assert statuses(out) == {**expected, "4": "finished"}
    assert starts(out) == {"lr=1": 1, "lr=2": 1, "lr=3": 1, "lr=4": 2, "lr=5": 1}
    assert sweep(out, path, stand_in(tmp_path, retry_failed=True)) == 1
    assert starts(out) == {"lr=1": 1, "lr=2": 1, "lr=3": 2, "lr=4": 2, "lr=5": 2}


def test_results_of_runs_that_are_no_longer_planned_stay_in_the_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(out, write_sweep(tmp_path, groups=rates(1, 2)), stand_in(tmp_path))
    assert sweep(out, write_sweep(tmp_path, groups=rates(2, 1.5)), stand_in(tmp_path)) == 0
    assert statuses(out) == {"2": "finished", "1.5": "finished", "1": "finished"}
    history = {line["run"]: line["perplexity"] for line in read_csv(out / "history.csv")}
    assert history["g__lr=1__seed=7"] == "100.0" and history["g__lr=1.5__seed=7"] == "150.0"


def test_an_axis_widens_until_its_best_value_lies_inside(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, groups=rates(1, 2)), tmp_path / "out"
    assert sweep(out, path, stand_in(tmp_path, extend=2)) == 0  # lower rates are better, always
    assert statuses(out) == dict.fromkeys(("1", "2", "0.5", "0.25"), "finished")
    assert json.loads((out / "extensions.json").read_text()) == {"g": {"lr": [0.5, 0.25]}}
    assert sweep(out, path, stand_in(tmp_path)) == 0  # a later call plans them too
    assert len(statuses(out)) == 4 and "lr: lowest" in (out / "table.md").read_text()


def test_the_time_limit_stops_what_runs_and_starts_nothing(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, groups=rates(6, 1)), tmp_path / "out"
    options = stand_in(tmp_path, per_gpu=1, deadline=time.monotonic() + 3)
    assert sweep(out, path, options) == 75
    assert statuses(out) == {"6": "pending", "1": "pending"}
    record = read_record(out / "runs" / "g__lr=6__seed=7")
    assert record is not None and [attempt.code for attempt in record.attempts] == [75]
    assert not (out / "runs" / "g__lr=1__seed=7").exists()


def test_after_the_limit_for_new_runs_the_running_ones_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_sweep(tmp_path, groups=rates(1, 2)), tmp_path / "out"
    asked: list[float] = []

    def past(moment: float | None) -> bool:
        asked.extend([] if moment is None else [moment])
        return moment is not None and len(asked) > 1

    monkeypatch.setattr("megalr.sweep.runner._past", past)
    assert sweep(out, path, stand_in(tmp_path, per_gpu=1, last_start=99.0)) == 75
    assert set(asked) == {99.0} and statuses(out) == {"1": "finished", "2": "pending"}
    assert not (out / "runs" / "g__lr=2__seed=7").exists()
    monkeypatch.undo()
    assert sweep(out, path, stand_in(tmp_path)) == 0
    assert statuses(out) == {"1": "finished", "2": "finished"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_runs_as_a_request_to_stop(tmp_path: Path, number: int) -> None:
    path, out = write_sweep(tmp_path, groups=rates(6, 1)), tmp_path / "out"
    metrics = out / "runs" / "g__lr=6__seed=7" / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or b"step" not in metrics.read_bytes():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert sweep(out, path, stand_in(tmp_path, per_gpu=1)) == 75
    assert statuses(out) == {"6": "pending", "1": "pending"}
    record = read_record(metrics.parent)
    assert record is not None and record.attempts[0].code == 75


def _running(program: Path) -> bool:
    return any(str(program) in (p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def test_runs_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, groups=rates(6)), tmp_path / "out"
    metrics = out / "runs" / "g__lr=6__seed=7" / "metrics.jsonl"
    text = (
        "import sys\nfrom pathlib import Path\nfrom tests.sweep.files import stand_in\n"
        "from tests.sweep.test_runner import sweep\n"
        "folder, path, out = map(Path, sys.argv[1:])\nsweep(out, path, stand_in(folder))\n"
    )
    command = [sys.executable, "-c", text, str(tmp_path), str(path), str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while not metrics.exists() or b"step" not in metrics.read_bytes():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    # The stand-in ends only when it is told to; then nothing writes into its folder any more.
    deadline = time.monotonic() + 20
    while _running(tmp_path / "stand_in.py") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _running(tmp_path / "stand_in.py")
    options = stand_in(tmp_path, deadline=time.monotonic() + 2)
    assert sweep(out, path, options) == 75 and statuses(out) == {"6": "pending"}


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, groups=rates(1, 3)), tmp_path / "out"
    sweep(out, path, stand_in(tmp_path))
    before = starts(out)
    longer = {"overrides": ["train.updates=9"]}
    with pytest.raises(UserError, match=r"g__lr=1__seed=7 was .* \(train.updates: 3 there, 9 here"):
        sweep(out, path, stand_in(tmp_path), **longer)
    assert starts(out) == before
    assert sweep(out, path, stand_in(tmp_path), overrides=["log.every=3"]) == 1  # changes nothing


def test_each_run_gets_its_gpu_its_cores_and_a_world_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    slots = machine_slots(None, 3)
    assert [slot.gpu for slot in slots] == ["4", "7"] * 3 and {s.threads for s in slots} == {2}
    assert [slot.gpu for slot in machine_slots(["7"], 1)] == ["7"]
    assert [slot.gpu for slot in machine_slots(1, 1)] == ["4"]
    with pytest.raises(UserError, match="--gpus is 3: this machine has 2 that torch can use"):
        machine_slots(3, 1)
    for wrong in (["0"], ["4", "4"]):
        with pytest.raises(UserError, match="give each GPU once; this machine has 4, 7"):
            machine_slots(wrong, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    path, out = write_sweep(tmp_path, groups=rates(1, 2)), tmp_path / "out"
    assert sweep(out, path, stand_in(tmp_path, per_gpu=1)) == 0
    assert "2 runs, 2 to do, 2 at a time on GPU 4, 7\n" in capsys.readouterr().out
    found = []
    for lr in (1, 2):
        metrics = out / "runs" / f"g__lr={lr}__seed=7" / "metrics.jsonl"
        environment = json.loads(metrics.read_text().splitlines()[0])["environment"]
        assert environment["OMP_NUM_THREADS"] == "6"
        assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "6"
        assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
        found.append(environment["CUDA_VISIBLE_DEVICES"])
    assert found == ["4", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [slot.gpu for slot in machine_slots(None, 2)] == [None, None]


def test_one_sweep_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    path, out = write_sweep(tmp_path, groups=rates(1)), tmp_path / "out"
    held = (
        "import sys, time\nfrom pathlib import Path\nfrom megalr.sweep.local import output_lock\n"
        "with output_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", held, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "held" in process.stdout.read(5)
        with pytest.raises(UserError, match="another job is writing here"):
            sweep(out, path, stand_in(tmp_path))
        process.kill()
