"""Ranks of a stand-in program: what they are given, how they end together, which code comes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalr.distributed import local_ranks
from megalr.distributed.local_ranks import LocalRanks, choose_gpus
from megalr.errors import UserError

SHOWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = """
import json, os, signal, sys, time
folder, what = sys.argv[1:]
rank = os.environ["RANK"]
got = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: got.append(number))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(dict(os.environ), file)
if what == "wait":
    while not got:
        time.sleep(0.02)
    time.sleep(1)  # saves
    with open(f"{folder}/{rank}.signals", "w") as file:
        json.dump(got, file)
    sys.exit(75)
if what.split(":")[0] == rank:
    code = int(what.split(":")[1])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
if what == "all":
    sys.exit(0)
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def test_every_rank_is_given_its_place_and_a_share_of_the_cores(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    assert LocalRanks([program, str(tmp_path), "all"], 3, ["4", "6", "7"]).run() == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    ports = {own["MASTER_PORT"] for own in found}
    assert len(ports) == 1
    for rank, own in enumerate(found):
        values = [str(rank), str(rank), "3", "3", "127.0.0.1", *ports]
        assert [own[name] for name in SHOWN] == values
        assert (own["OMP_NUM_THREADS"], own["CUDA_VISIBLE_DEVICES"]) == ("2", "4,6,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert LocalRanks([program, str(tmp_path), "all"], 1).run() == 0
    assert json.loads((tmp_path / "0.json").read_text())["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(("ends", "code"), [("1:3", 3), ("0:2", 2), ("1:-9", 137)])
def test_the_code_of_the_rank_that_failed_comes_out_and_the_others_are_ended(
    ends: str,
    code: int,
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local_ranks, "PEER_SECONDS", 0.3)
    assert LocalRanks([program, str(tmp_path), ends], 2).run() == code
    killed = "error: rank 1 was killed by SIGKILL\n" if code == 137 else ""
    assert capsys.readouterr().err == killed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_they_end_in_their_own_time(
    number: signal.Signals, program: str, tmp_path: Path
) -> None:
    code = (
        "import signal, sys; from megalr.distributed.local_ranks import LocalRanks;"
        # A shell's background jobs, such as these tests may be, begin with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.exit(LocalRanks([{program!r}, {str(tmp_path)!r}, 'wait'], 2).run())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    launcher = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)):
        assert launcher.poll() is None
        time.sleep(0.02)
    for _ in range(3):  # a scheduler may repeat itself; Ctrl-C is pressed twice
        launcher.send_signal(number)
        time.sleep(0.05)
    assert launcher.wait(timeout=60) == 75
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.signals").read_text()) == [number]


def test_gpus_are_chosen_by_number_or_by_name() -> None:
    there = ["4", "7", "GPU-a"]
    assert choose_gpus(None, there) == there
    assert choose_gpus(2, there) == ["4", "7"]
    assert choose_gpus(["GPU-a", "4"], there) == ["GPU-a", "4"]
    for wanted, message in (
        (4, "--gpus is 4: this machine has 3 that torch can use"),
        (0, "--gpus is 0"),
        (["5"], "--gpus names '5': give each GPU once; this machine has 4, 7, GPU-a"),
        (["4", "4"], "--gpus names '4'"),
    ):
        with pytest.raises(UserError, match=message):
            choose_gpus(wanted, there)  # type: ignore[arg-type]
