"""Training over two hosts that know nothing of each other but an address."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed
import yaml

from tests.network.hosts import Hosts, why_not
from tests.synthetic import write_dataset
from tests.training.runs import events, settings

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 12
PORT = 29511

NO_HOSTS = why_not()
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS)),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


def start_rank(
    hosts: Hosts, rank: int, recipe: Path, *arguments: str, **variables: str
) -> subprocess.Popen[str]:
    """Rank ``rank`` on the host of that number, as a user would start it by hand."""
    launched = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "node0", "MASTER_PORT": str(PORT)}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "launchers/pretrain.py", "--config", str(recipe), *arguments]
    return hosts.start(rank, command, ROOT, environment)


def write_recipe(folder: Path, data: Path, timeout_seconds: int) -> Path:
    """An endless run in ``folder / run``."""
    values = settings(
        folder / "run",
        data,
        train={"updates": 100_000},
        schedule={"name": "constant"},
        evaluation={"every": 0},
        run={"timeout_seconds": timeout_seconds},
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Outputs of processes that end by themselves within this time; none is left behind."""
    outputs = []
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=deadline - time.monotonic())[0])
    finally:
        for process in processes:
            process.kill()
    return outputs


def error_of(output: str) -> str:
    """The one line that starts with ``error:``; nothing else may complain."""
    assert "Traceback" not in output, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    return line


def test_ranks_meet_over_the_network_and_a_cut_link_ends_them_in_time(
    hosts: Hosts, data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, data, TIMEOUT_SECONDS)
    longer = f"run.timeout_seconds={TIMEOUT_SECONDS}"
    ranks = [start_rank(hosts, rank, recipe, longer) for rank in range(2)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not (metrics.exists() and '"update": 5,' in metrics.read_text()):
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        hosts.cut()
        cut = time.monotonic()
        outputs = finish(ranks, TIMEOUT_SECONDS + 60)
        # On an idle machine both end a second after the limit; the rest is for a busy one.
        assert time.monotonic() - cut < TIMEOUT_SECONDS + 45
    finally:
        for rank in ranks:
            rank.kill()
        hosts.plug()
    assert "ranks 2 on 2 hosts: node0 (ranks 0: 1 x" in outputs[0]
    assert "fabric0 10.77.0.1" in outputs[0] and "GLOO_SOCKET_IFNAME=fabric0" in outputs[0]
    for number, output in enumerate(outputs):
        assert ranks[number].returncode == 1
        line = error_of(output)
        said = re.search(rf"rank {number} on node{number}: (\w+) got no answer", line)
        # Any of them: the cut may come in an update, an evaluation or a save (barrier).
        assert said is not None and hasattr(torch.distributed, said[1]), line
        assert f"limit run.timeout_seconds {TIMEOUT_SECONDS}" in line
    assert events(tmp_path / "run", "step")


RENDEZVOUS = """
import sys
from megalr.errors import UserError, exit_cleanly
from megalr.distributed.rendezvous import rendezvous
error = UserError(sys.argv[2]) if len(sys.argv) > 2 else None
exit_cleanly(lambda: print("met", rendezvous(error, float(sys.argv[1])) is not None))
"""


def meet(
    hosts: Hosts, rank: int, seconds: float, *trouble: str, **variables: str
) -> subprocess.Popen[str]:
    """A rank that does nothing but the rendezvous."""
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "node0"}
    environment |= {"MASTER_PORT": str(PORT), **variables}
    return hosts.start(
        rank, [sys.executable, "-c", RENDEZVOUS, str(seconds), *trouble], ROOT, environment
    )


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh: apt-get install pdsh")
def test_deepspeed_starts_the_ranks_of_a_hostfile_through_pdsh_and_ssh(
    hosts: Hosts, data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, data, 120)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    python = Path(sys.executable)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{hosts.write_ssh()}:{python.parent}:{os.environ['PATH']}"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", hosts.addresses[0]]
    command += ["launchers/pretrain.py", "--config", str(recipe), "train.updates=3"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ranks 2 on 2 hosts: node0 (ranks 0: 1 x" in done.stdout
    assert [event["update"] for event in events(tmp_path / "run", "step")] == [1, 2, 3]


def test_a_rank_in_trouble_is_named_on_all_hosts(hosts: Hosts) -> None:
    ranks = [meet(hosts, 0, 60), meet(hosts, 1, 60, "no GPU left")]
    outputs = finish(ranks, 120)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert error_of(outputs[0]) == "error: rank 1 on node1: no GPU left"
    assert "error:" not in outputs[1]  # only rank 0 prints it


def test_what_keeps_ranks_apart_is_named_in_time(hosts: Hosts) -> None:
    listen = f"import socket, time; s = socket.create_server(('', {PORT + 1})); time.sleep(90)"
    other = hosts.start(0, [sys.executable, "-c", listen], ROOT, dict(os.environ))
    hosts.cut()
    try:
        ranks = [
            meet(hosts, 0, 4),
            meet(hosts, 1, 4),
            meet(hosts, 0, 4, MASTER_PORT=str(PORT + 1)),
            meet(hosts, 1, 4, MASTER_ADDR="nowhere"),
        ]
        waiting, unreachable, occupied, unknown = finish(ranks, 120)
    finally:
        hosts.plug()
        other.kill()
    assert [rank.returncode for rank in ranks] == [2, 2, 2, 2]
    assert f"rank 1 of 2 did not arrive at node0:{PORT} within 4 s" in error_of(waiting)
    expected = f"rank 1 on node1 cannot reach node0:{PORT} (MASTER_ADDR:MASTER_PORT) within 4 s"
    assert expected in error_of(unreachable)
    assert f"MASTER_PORT {PORT + 1} is in use on node0" in error_of(occupied)
    assert f"cannot reach nowhere:{PORT}" in error_of(unknown)
