"""How a process starts, and how ranks agree when one of them is in trouble."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalr.distributed.agreement import raise_on_any_rank, run_on_rank0
from megalr.distributed.process_group import (
    gpu_identity,
    limit_collectives,
    own_device,
    start_distributed,
)
from megalr.distributed.rendezvous import RankInfo, find_problem
from megalr.errors import AgreedError, UserError
from tests.ranks import ON_THE_CPU, run_distributed


def _run_alone(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program on the CPU that no launcher has started."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= ON_THE_CPU | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_one_process_starts_without_a_launcher_and_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import atexit\n"
        "import torch.distributed as dist\n"
        "from megalr.distributed.process_group import start_distributed\n"
        "atexit.register(lambda: print('at the end:', dist.is_initialized()))\n"
        "print(start_distributed(), dist.get_world_size(), dist.get_backend())\n"
    )
    done = _run_alone(code, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    # Groups that outlive Python's threads abort some processes: docs/dev/deepspeed-notes.md.
    assert done.stdout.splitlines()[-2:] == ["cpu 1 gloo", "at the end: False"], done.stderr
    assert done.returncode == 0
    assert not (tmp_path / "extensions").exists()


UNTIMELY = """
import os
import torch
import torch.distributed as dist
from megalr.distributed import process_group

process_group.GLOO_REST_SECONDS = 1.0  # this machine may be busy, and these threads come last
process_group.start_distributed()
held = dist.group.WORLD  # as DeepSpeed and FSDP2 hold it
dist.all_reduce(torch.ones(9))
lagging = False
core = {min(os.sched_getaffinity(0))}
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), core)
    with open(f"/proc/self/task/{thread}/comm") as file:
        if file.read().strip() == "pt_gloo_runloop":  # runs when the main thread does not
            os.setpriority(os.PRIO_PROCESS, int(thread), 10)
            lagging = True
for _ in range(100):
    dist.all_reduce(torch.ones(100_000))
print("lag:", lagging)  # a thread that has not run yet has no name of its own
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="sets the priority of single threads")
def test_gloo_threads_that_lag_behind_do_not_abort_the_process() -> None:
    """Without the wait at the end more than half of such processes are killed by SIGABRT."""
    for _ in range(4):
        done = _run_alone(UNTIMELY, OMP_NUM_THREADS="1")
        assert done.stdout.endswith("lag: True\n")
        assert done.returncode == 0, done.stderr


def test_more_processes_than_gpus_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 of this machine has no GPU: 2 visible"):
        start_distributed()


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_GPUS_PER_TASK": "a100:1"},
        {"SLURM_NTASKS_PER_GPU": "1"},
        {"SLURM_GPU_BIND": "single:1"},
        {"SLURM_TRES_PER_TASK": "gres/gpu:h100=1"},
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "MIG-4d2f"},
        {},  # a cgroup alone
    ],
)
def test_a_task_that_is_shown_one_gpu_uses_it(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert own_device(3) == torch.device("cuda", 0)
    assert chosen == [0] and os.environ["LOCAL_RANK"] == "0"


def test_ranks_that_share_a_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", index) for index in range(2)]
    uuids = {0: "GPU-aa", 1: "GPU-bb"}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=uuids[device.index]),
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = (gpu_identity(gpu) for gpu in gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    one = gpu_identity(gpus[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-2")
    two = gpu_identity(gpus[1])
    assert (first, one, two) == ("GPU-aa", "GPU-aa MIG-1", "GPU-bb MIG-2")
    assert gpu_identity(torch.device("cpu")) == ""

    def problem(*ranks: tuple[str, str]) -> str | None:
        return find_problem([RankInfo(host, "10.0.0.1", None, gpu) for host, gpu in ranks])

    assert problem(("a", first), ("a", second), ("b", first), ("b", second)) is None
    assert problem(("a", first), ("a", one)) is None
    assert problem(("a", ""), ("a", "")) is None  # the CPU
    shared = problem(("a", second), ("b", first), ("a", first), ("b", first))
    assert shared is not None and shared.startswith("ranks 1 and 3 on b have the same GPU (GPU-aa)")


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match="SLURM gave this job 8 GPUs on this node but torch sees"):
        own_device(0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert own_device(0) == torch.device("cpu")


def _trouble_on(rank_in_trouble: int) -> str:
    import torch.distributed as dist

    error = UserError("no data here") if dist.get_rank() == rank_in_trouble else None
    try:
        raise_on_any_rank(error)
    except AgreedError as error:
        return str(error)
    return "fine"


def _ask_main(fails: bool) -> object:
    import torch.distributed as dist

    def look() -> int:
        assert dist.get_rank() == 0
        if fails:
            raise UserError("folder in use")
        return 17

    try:
        return run_on_rank0(look)
    except AgreedError as error:
        return str(error)


def test_all_ranks_raise_the_error_of_the_failing_one() -> None:
    assert run_distributed(_trouble_on, 3, 1) == ["rank 1: no data here"] * 3
    assert run_distributed(_trouble_on, 3, -1) == ["fine"] * 3


@pytest.mark.parametrize("fails, expected", [(False, 17), (True, "folder in use")])
def test_result_and_error_of_rank_0_reach_all_ranks(fails: bool, expected: object) -> None:
    assert run_distributed(_ask_main, 3, fails) == [expected] * 3


def _limits() -> tuple[float, list[float]]:
    """Limit of a group that DeepSpeed makes, and of all groups once they are limited."""
    import deepspeed.comm
    import torch.distributed as dist

    def limit(group: object) -> float:
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[attr-defined]

    group = deepspeed.comm.new_group([0, 1])
    fresh = limit(group)
    groups = dist.distributed_c10d._world.pg_map
    before = {member: limit(member) for member in groups}
    limit_collectives(47)
    after = [limit(member) for member in groups]
    for member, seconds in before.items():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), member)
    return fresh, after


def test_groups_that_deepspeed_makes_get_the_run_s_limit_only_afterwards() -> None:
    """They start with torch's own limit, whatever init_distributed was given."""
    for fresh, after in run_distributed(_limits, 2):
        assert fresh == 1800
        assert len(after) >= 2 and set(after) == {47}
