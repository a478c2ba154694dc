"""Ranks from the variables of SLURM and other launchers."""

from __future__ import annotations

import os

import pytest

from megalr.distributed.launcher_env import adopt_launcher, first_host, slurm_variables
from megalr.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "32",
}
LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMPI_COMM_WORLD_RANK",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher, put back afterwards."""
    for name in list(os.environ):
        if name in LAUNCHERS or name.startswith(("SLURM_", "PMI_")):
            monkeypatch.delenv(name)
    for name in LAUNCHERS[:5]:  # so that what is set in the test is removed again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "node_list, host",
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-012,14],big1", "gpu007"),
        ("rack[2-3]node[10,12]", "rack2node10"),
        ("a-b[3],a-b[5-6]", "a-b3"),
        ("n[1-2].cluster.example,x", "n1.cluster.example"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_srun_variables_become_ranks_and_two_jobs_get_two_ports() -> None:
    found = slurm_variables(SRUN)
    assert found == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(10000 + 1234567 % 20000),
    }
    other = slurm_variables({**SRUN, "SLURM_JOB_ID": "1234568"})
    assert other["MASTER_PORT"] != found["MASTER_PORT"]
    given = slurm_variables({**SRUN, "MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "4000"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("ib-gpu07", "4000")


def test_missing_or_senseless_slurm_variables_are_named() -> None:
    lacking = {k: v for k, v in SRUN.items() if k not in ("SLURM_LOCALID", "SLURM_STEP_NODELIST")}
    with pytest.raises(UserError, match="SLURM_LOCALID, SLURM_STEP_NODELIST are not set"):
        slurm_variables(lacking)
    with pytest.raises(UserError, match="SLURM_PROCID is 'x', not a number"):
        slurm_variables({**SRUN, "SLURM_PROCID": "x"})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"RANK": "4"}, "RANK is 4, LOCAL_RANK 0, WORLD_SIZE 4: ranks count from 0"),
        ({"RANK": "-1"}, "RANK is -1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK -1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999: give a port below 65536"),
    ],
)
def test_numbers_that_no_launcher_sets_are_refused(
    changed: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in zip(LAUNCHERS, ("3", "0", "4", "here", "77"), strict=False):
        environment.setenv(name, changed.get(name, value))
    with pytest.raises(UserError, match=message):
        adopt_launcher()


def test_a_launcher_wins_over_slurm_and_an_allocation_is_not_a_launcher(
    environment: pytest.MonkeyPatch,
) -> None:
    for name, value in SRUN.items():
        environment.setenv(name, value)
    for name, value in zip(LAUNCHERS, ("3", "3", "4", "here", "77"), strict=False):
        environment.setenv(name, value)
    adopt_launcher()  # torchrun under srun: one task a node
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")
    environment.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="RANK is '3' but MASTER_ADDR is not set"):
        adopt_launcher()
    environment.delenv("RANK")
    adopt_launcher()
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("9", "gpu07")
    environment.delenv("RANK")
    environment.delenv("SLURM_STEP_NUM_TASKS")  # the batch script itself, or a shell of salloc
    with pytest.raises(UserError, match=r"has 32 tasks .* put srun before the command"):
        adopt_launcher()
    environment.setenv("SLURM_NTASKS", "1")
    adopt_launcher()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
