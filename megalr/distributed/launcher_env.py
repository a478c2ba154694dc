"""Detect the launcher that started this process; set RANK, WORLD_SIZE and so on from it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import psutil

from megalr.errors import UserError

WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_PORT = 29500


def adopt_launcher() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    Sources, in this order: these variables themselves (``deepspeed``, torchrun), Open MPI's
    mpirun, SLURM's srun, another MPI's mpiexec. Without any of them the world is this process.

    Raises:
        UserError: some of the variables are missing or not numbers, or a SLURM job of several
            tasks started this process without srun.
    """
    environment = os.environ
    if "RANK" in environment:
        _check_complete(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        _discover_by_mpi()
    elif "SLURM_STEP_NUM_TASKS" in environment and environment["SLURM_STEP_NUM_TASKS"] != "1":
        environment.update(slurm_variables(environment))
    elif "PMI_RANK" in environment:
        _discover_by_mpi()
    else:
        _check_started_by_srun(environment)
        environment.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
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
        _number(environment, name)
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
    missing = [name for name in WORLD_VARIABLES if not environment.get(name)]
    if missing:
        raise UserError(
            f"RANK is {environment['RANK']!r} but {', '.join(missing)} {_is_not(missing)} set: "
            "start with deepspeed, torchrun, mpirun or srun, or unset RANK for one process"
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    rank, local_rank, world, port = (
        _number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    if not (0 <= rank < world and local_rank >= 0):
        raise UserError(
            f"RANK is {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {world}: ranks count from 0 and "
            "are below WORLD_SIZE; let the launcher set them"
        )
    if not 0 <= port < 65536:
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
    from mpi4py import MPI

    world = MPI.COMM_WORLD
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


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(
            f"{name} is {environment[name]!r}, not a number: unset it, or let the launcher set it"
        ) from None


def _is_not(names: list[str]) -> str:
    return "is not" if len(names) == 1 else "are not"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
