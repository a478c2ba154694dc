"""Start of a process: world, device, agreement between ranks."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megalr.errors import AgreedError, UserError

T = TypeVar("T")


def start_distributed() -> torch.device:
    """Join the world that the launcher made, or be a world of one; return this rank's device.

    Understood: the variables of ``deepspeed`` and torchrun (RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT), MPI (through mpi4py), and nothing at all: one process.

    Raises:
        UserError: more processes on this machine than it has GPUs.
    """
    import deepspeed  # here, because it takes seconds and --help should not

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 has renamed: nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    launched = "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
    if not launched:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"process {local_rank + 1} of this machine has no GPU: {count} visible; start at "
                f"most {count} processes on it"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    skip_shared_memory_op()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the ranks cannot meet at {where} (MASTER_ADDR:MASTER_PORT): "
            f"{str(error).splitlines()[0]} If another job uses the port, start this one with "
            "--master_port of another number"
        ) from error
    return device


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory all-reduce, which only inference uses.

    Compiling takes a minute at the first start of a machine, and a process killed meanwhile leaves
    a lock that every later start waits for (docs/deepspeed-notes.md).
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_main() -> bool:
    """Whether this is rank 0 of the world."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 and give its result, or its UserError, to every rank.

    Every rank must call it. Files are looked at by one rank, and no rank goes on while another
    one has stopped.
    """
    answer: list[tuple[bool, object]] = [(True, None)]
    if is_main():
        try:
            answer = [(True, function())]
        except UserError as error:
            answer = [(False, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    succeeded, value = answer[0]
    if not succeeded:
        raise AgreedError(str(value))
    return value  # type: ignore[return-value]


def agree(error: Exception | None) -> None:
    """Raise an AgreedError on every rank if any rank has an error; every rank must call it.

    The error is the lowest such rank's, with its number.
    """
    found: list[str | None] = [str(error) if error is not None else None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, str(error) if error is not None else None)
    for rank, text in enumerate(found):
        if text is not None:
            raise AgreedError(f"rank {rank}: {text}")
