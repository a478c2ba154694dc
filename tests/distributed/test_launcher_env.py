"""Ranks from the variables of SLURM and other launchers."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megalr.distributed import launcher_env
from megalr.distributed.launcher_env import (
    adopt_launcher,
    check_launched_size,
    first_host,
    number_of_processes,
    slurm_variables,
)
from megalr.distributed.mpi import world_communicator
from megalr.distributed.process_group import start_distributed
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
OTHERS = ("SLURM", "PMI", "OMPI", "MV2", "MPI_LOCAL", "GROUP_WORLD_SIZE", "CROSS_SIZE")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher, put back afterwards."""
    for name in list(os.environ):
        if name in LAUNCHERS or name.startswith(OTHERS):
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


TASK = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "77",
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def use(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        TASK,
        TASK | {"PMI_RANK": "0", "PMI_SIZE": "1"},  # --mpi=pmi2
        TASK | {"PMIX_RANK": "0"},  # --mpi=pmix
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        ALONE,  # without an address
        ALONE | {"MASTER_ADDR": "no.such.host", "MASTER_PORT": "no number"},
        ALONE | {"GROUP_WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_a_world_of_one_without_mpi_address_or_port(
    variables: dict[str, str], environment: pytest.MonkeyPatch
) -> None:
    environment.setitem(sys.modules, "mpi4py", None)  # importing it fails
    use(environment, variables)
    adopt_launcher()
    check_launched_size()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]
    assert number_of_processes() == 1


@pytest.mark.parametrize(
    "variables, said",
    [
        (SRUN | PMI | {"PMI_SIZE": "16"}, "9 of 16"),
        (SRUN | {"PMIX_RANK": "9"}, "9 of 16"),
        (SRUN | {"PMI_RANK": "0", "PMI_SIZE": "1"}, "9 of 16"),
        # srun starts a daemon of mpiexec on each of two nodes, each of which starts 8 ranks
        (TASK | {"SLURM_STEP_NUM_TASKS": "2"} | PMI | {"PMI_SIZE": "16"}, "MPI of 16"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, "MPI of 2"),
        (TASK | PMI, "MPI of 2"),  # mpiexec in an interactive step
        (PMI, "MPI of 2"),
        (TORCHRUN | PMI, "3 of 4"),
    ],
)
def test_the_innermost_launcher_of_several_processes_counts(
    variables: dict[str, str], said: str, environment: pytest.MonkeyPatch
) -> None:
    def discover() -> None:
        _, ranks = launcher_env.launched_ranks()
        os.environ.update(RANK="MPI", WORLD_SIZE=str(ranks))

    environment.setattr(launcher_env, "_discover_by_mpi", discover)
    use(environment, variables)
    adopt_launcher()
    check_launched_size()
    assert f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}" == said


@pytest.mark.parametrize(
    "variables, message",
    [
        (ALONE | PMI, "PMI_SIZE is 2 but this process is in a world of 1"),
        (ALONE | OPEN_MPI, "OMPI_COMM_WORLD_SIZE is 2 but"),
        (ALONE | SRUN, "SLURM_STEP_NUM_TASKS is 16 but"),
        (ALONE | {"MV2_COMM_WORLD_SIZE": "4"}, "MV2_COMM_WORLD_SIZE is 4 but"),
        (TORCHRUN | SRUN, "SLURM_STEP_NUM_TASKS is 16 but this process is in a world of 4"),
        (
            # srun starts torchrun on each of two nodes, and each knows of itself alone
            TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1"},
            "is in a world of 4 on this node alone",
        ),
        (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "CROSS_SIZE": "1"}, "on this node alone"),
        (ALONE | {"PMI_SIZE": "two"}, "PMI_SIZE is 'two', not a number"),
    ],
)
def test_processes_that_would_each_run_on_their_own_are_refused(
    variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    use(environment, variables)
    with pytest.raises(UserError, match=message):
        start_distributed()


def test_another_mpi_than_the_launcher_s_is_refused(environment: pytest.MonkeyPatch) -> None:
    """mpiexec of MPICH under an mpi4py built for Open MPI, where every rank is 0 of 1."""

    class World:
        def Get_size(self) -> int:
            return 1

    mpi4py = ModuleType("mpi4py")
    mpi4py.MPI = SimpleNamespace(COMM_WORLD=World())  # type: ignore[attr-defined]
    environment.setitem(sys.modules, "mpi4py", mpi4py)
    use(environment, PMI)
    with pytest.raises(UserError, match=r"started 2 ranks and mpi4py sees 1"):
        start_distributed()
    with pytest.raises(UserError, match=r"started 2 ranks and mpi4py sees 1"):
        world_communicator()
    environment.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"2 MPI ranks, but mpi4py cannot load an MPI library"):
        start_distributed()
    assert number_of_processes() == 2


@pytest.mark.parametrize("nodes", [{"GROUP_WORLD_SIZE": "2"}, {"CROSS_SIZE": "2"}, {}])
def test_a_launcher_under_srun_that_knows_all_nodes_is_fine(
    nodes: dict[str, str], environment: pytest.MonkeyPatch
) -> None:
    use(environment, TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"} | nodes)
    adopt_launcher()
    check_launched_size()
