"""Detect the launcher that started this process; set RANK, WORLD_SIZE and so on from it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import psutil

from megalr.distributed.mpi import launched_ranks, number, world_communicator
from megalr.errors import UserError

WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NODE_VARIABLES = ("GROUP_WORLD_SIZE", "CROSS_SIZE")
"""Number of nodes, set by torchrun and by deepspeed's launcher."""
DEFAULT_PORT = 29500


def adopt_launcher() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    Sources: these variables themselves (``deepspeed``, torchrun), else the innermost of MPI's
    mpirun or mpiexec and SLURM's srun that started several processes. Without any of them the
    world is this process. A world of one uses neither MASTER_ADDR nor MASTER_PORT.

    Raises:
        UserError: some of the variables are missing or not numbers, or a SLURM job of several
            tasks started this process without srun.
    """
    environment = os.environ
    if "RANK" in environment:
        _check_complete(environment)
    elif _is_srun_innermost(environment):
        environment.update(slurm_variables(environment))
    elif launched_ranks(environment)[1] > 1:
        _discover_by_mpi()
    else:
        _check_started_by_srun(environment)
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if environment["WORLD_SIZE"] == "1":  # DeepSpeed looks for another launcher without them
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(DEFAULT_PORT))


def check_launched_size(environment: Mapping[str, str] = os.environ) -> None:
    """Check that this process is in the world that its launcher started.

    To be called after :func:`adopt_launcher`. Variables of an earlier session, another MPI library
    or a torchrun that does not know of the other nodes would otherwise let every process train
    alone.

    Raises:
        UserError: the launcher started more processes than the world has, or WORLD_SIZE is not a
            multiple of their number.
    """
    variable, started = launched_ranks(environment)
    if started == 1:
        variable, started = "SLURM_STEP_NUM_TASKS", slurm_tasks(environment)
    world = int(environment["WORLD_SIZE"])
    nodes = [environment[name] for name in NODE_VARIABLES if name in environment]
    if started > 1 and (world % started != 0 or nodes == ["1"]):
        found = f"a world of {world}" + (" on this node alone" if nodes == ["1"] else "")
        raise UserError(
            f"{variable} is {started} but this process is in {found} (WORLD_SIZE): each of the "
            f"{started} would run on its own; let one launcher start all processes (unset RANK, "
            "WORLD_SIZE and LOCAL_RANK if they are left from elsewhere, give torchrun --nnodes), "
            f"or unset {variable} if it is not this launch's"
        )


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the SLURM step that this process is one of; 1 outside a step."""
    name = "SLURM_STEP_NUM_TASKS"
    return number(environment, name) if name in environment else 1


def number_of_processes(environment: Mapping[str, str] = os.environ) -> int:
    """The largest number of processes that any launcher's variable says were started."""
    world = number(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1
    return max(world, launched_ranks(environment)[1], slurm_tasks(environment))


def _is_srun_innermost(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process itself, not an MPI launcher's daemon on its node."""
    tasks = slurm_tasks(environment)
    return tasks > 1 and (
        launched_ranks(environment)[1] in (1, tasks) and "OMPI_COMM_WORLD_RANK" not in environment
    )


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and so on of a task started by srun, from SLURM's variables.

    MASTER_ADDR and MASTER_PORT are kept if set. Otherwise: the first node of the step, and a port
    derived from the job id, so that two jobs on one node do not share it.

    Raises:
        UserError: a variable that srun sets is missing or not a number.
    """
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    missing = [name for name in (*needed, "SLURM_JOB_ID") if not environment.get(name)]
    if missing:
        raise UserError(
            f"srun started this process but {', '.join(missing)} {_is_not(missing)} set: start it "
            "with plain srun, or export RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    for name in (*needed[:3], "SLURM_JOB_ID"):
        number(environment, name)
    port = 10000 + int(environment["SLURM_JOB_ID"]) % 20000
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(node_list: str) -> str:
    """First host of SLURM's compressed node list: ``gpu[007-012,14],big1`` gives gpu007."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def host_name() -> str:
    """Name of this machine in messages: SLURM's node name, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _check_complete(environment: Mapping[str, str]) -> None:
    alone = environment.get("WORLD_SIZE") == "1"
    needed = WORLD_VARIABLES[: 2 if alone else 4]
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"RANK is {environment['RANK']!r} but {', '.join(missing)} {_is_not(missing)} set: "
            "start with deepspeed, torchrun, mpirun or srun, or unset RANK for one process"
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    rank, local_rank, world = (
        number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if not (0 <= rank < world and local_rank >= 0):
        raise UserError(
            f"RANK is {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {world}: ranks count from 0 and "
            "are below WORLD_SIZE; let the launcher set them"
        )
    if not alone and not 0 <= (port := number(environment, "MASTER_PORT")) < 65536:
        raise UserError(f"MASTER_PORT is {port}: give a port below 65536 that is free")


def _check_started_by_srun(environment: Mapping[str, str]) -> None:
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_NUM_TASKS" not in environment and tasks != "1":
        raise UserError(
            f"this SLURM job has {tasks} tasks (SLURM_NTASKS) but srun did not start this process: "
            "put srun before the command, or unset SLURM_NTASKS for one process"
        )


def _discover_by_mpi() -> None:
    """Set RANK and so on from MPI; MASTER_ADDR and MASTER_PORT are kept if set."""
    world = world_communicator()
    from mpi4py import MPI

    rank = world.Get_rank()
    hosts = world.allgather(MPI.Get_processor_name())
    address = world.bcast(_first_address() if rank == 0 else None, root=0)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(hosts[:rank].count(hosts[rank])),
        WORLD_SIZE=str(world.Get_size()),
        MASTER_ADDR=os.environ.get("MASTER_ADDR") or address,
        MASTER_PORT=os.environ.get("MASTER_PORT") or str(DEFAULT_PORT),
    )


def _first_address() -> str:
    """First IPv4 address of this machine that is not a loopback address, if it has one."""
    addresses = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    return addresses[0] if addresses else "127.0.0.1"


def _is_not(names: list[str]) -> str:
    return "is not" if len(names) == 1 else "are not"
