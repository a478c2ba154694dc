"""Start of a process: world, device, agreement between ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megalr.errors import AgreedError, UserError
from megalr.training.launch import adopt_launcher, host_name
from megalr.training.rendezvous import meet

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 1800.0
"""Limit of a collective where no run configures one."""


def start_distributed(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> torch.device:
    """Join the world that the launcher made, or be a world of one; return this rank's device.

    What counts as a launcher: :func:`megalr.training.launch.adopt_launcher`.

    Args:
        timeout_seconds: how long a collective may take before it counts as lost.

    Raises:
        UserError: the ranks cannot meet, or one of them has no GPU left to work on.
    """
    import deepspeed  # here, because it takes seconds and --help should not

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 has renamed: nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    adopt_launcher()
    error, device = None, torch.device("cpu")
    try:
        device = own_device(int(os.environ["LOCAL_RANK"]))
    except UserError as caught:
        error = caught
    skip_shared_memory_op()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized() or os.environ["WORLD_SIZE"] == "1":
        if error is not None:
            raise error
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        return device
    store = meet(error, timeout_seconds)
    timeout = timedelta(seconds=timeout_seconds)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    del store  # rank 0 of DeepSpeed's world serves it from now on
    return device


def limit_collectives(timeout_seconds: float) -> None:
    """Give every group made so far this limit; DeepSpeed makes its groups with torch's own.

    gloo raises an error in the call, which :mod:`megalr.training.lost` puts into words; NCCL's
    watchdog ends the process and names rank and collective in its log.
    """
    timeout = timedelta(seconds=timeout_seconds)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def own_device(local_rank: int) -> torch.device:
    """The GPU of the process with this number on its machine; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        if os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0" and not _cpu_is_meant():
            raise UserError(
                f"SLURM gave this job {os.environ['SLURM_GPUS_ON_NODE']} GPUs on this node but "
                "torch sees none: check the driver and torch's CUDA build (nvidia-smi, "
                "torch.version.cuda), or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("SLURM_GPUS_PER_TASK") == "1":
        # SLURM shows every task its own GPU only, as number 0; DeepSpeed reads LOCAL_RANK.
        os.environ["LOCAL_RANK"] = "0"
        local_rank = 0
    if local_rank >= count:
        raise UserError(
            f"process {local_rank + 1} of this machine has no GPU: {count} visible; start at "
            f"most {count} processes on it"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _cpu_is_meant() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


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

    The error is the lowest such rank's, with its number and its host where there are several.
    """
    own = host_name(), str(error) if error is not None else None
    found = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
    hosts = {host for host, _ in found}
    for rank, (host, text) in enumerate(found):
        if text is not None:
            where = f"rank {rank}{f' on {host}' if len(hosts) > 1 else ''}: "
            raise AgreedError(f"{where if len(found) > 1 else ''}{text}")


def agreed(function: Callable[[], T], *kinds: type[Exception]) -> T:
    """``function()`` on every rank, or an AgreedError on every rank if one raises.

    Caught are UserErrors and the ``kinds`` of errors named besides.
    """
    expected: tuple[type[Exception], ...] = (UserError, *kinds)
    error: Exception | None = None
    results: list[T] = []
    try:
        results.append(function())
    except expected as caught:
        error = caught
    agree(error)
    return results[0]
