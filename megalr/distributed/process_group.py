"""Start the process group and choose this rank's device."""

from __future__ import annotations

import atexit
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megalr.distributed.launcher_env import adopt_launcher, check_launched_size
from megalr.distributed.rendezvous import rendezvous
from megalr.errors import UserError

DEFAULT_TIMEOUT_SECONDS = 1800.0
"""Time limit of a collective outside a configured run."""

GLOO_REST_SECONDS = 0.1
"""How long the end of a program waits for gloo's threads; they need about a millisecond."""


def start_distributed(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> torch.device:
    """Join the launcher's world, or start a world of one; return this rank's device.

    Launchers: :func:`megalr.distributed.launcher_env.adopt_launcher`. A gloo world ends with the
    program, before Python's threads do: see :func:`_leave`.

    Args:
        timeout_seconds: time limit of a collective.

    Raises:
        UserError: the launcher started another number of processes, the rendezvous fails, or a
            rank has no GPU.
    """
    adopt_launcher()
    check_launched_size()
    error, device = None, torch.device("cpu")
    try:
        device = own_device(int(os.environ["LOCAL_RANK"]))
    except UserError as caught:
        error = caught
    if dist.is_initialized():
        if error is not None:
            raise error
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "gloo":
        atexit.register(_leave)
    if os.environ["WORLD_SIZE"] == "1":
        if error is not None:
            raise error
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    gpu = "" if error is not None else gpu_identity(device)
    store = rendezvous(error, timeout_seconds, gpu)
    # Binding the device hangs in torch before 2.7.1 (pytorch issue 153960).
    bind = device.type == "cuda" and torch.__version__ >= "2.7.1"
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if bind else None,
    )
    del store  # from here on torch's own store is used
    return device


def _leave() -> None:
    """Destroy the process groups and let gloo's threads come to rest.

    A gloo thread releases the tensors of a collective after the caller has its result. For that it
    asks for the interpreter's lock; if Python has ended by then, it is ended instead, and C++
    aborts the process: a successful program exits with SIGABRT (seen with torch 2.13: 12 % of
    processes whose last act is an all-reduce). Destroying a group joins its threads only if nothing
    else refers to the group, and DeepSpeed and FSDP2 do to the end; so the lock is also left to
    the threads for a while.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(GLOO_REST_SECONDS)


def limit_collectives(timeout_seconds: float) -> None:
    """Set the time limit of every existing group, DeepSpeed's (made with torch's default) too.

    On timeout gloo raises in the call, which :mod:`megalr.distributed.peer_errors` turns into one
    line; NCCL's watchdog ends the process and logs rank and collective.
    """
    timeout = timedelta(seconds=timeout_seconds)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def own_device(local_rank: int) -> torch.device:
    """The GPU of the process with this local rank; the CPU if torch sees no GPU.

    A process that sees one GPU uses it, whatever its local rank; LOCAL_RANK becomes 0 then.
    """
    if not torch.cuda.is_available():
        if os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0" and not _cpu_requested():
            raise UserError(
                f"SLURM gave this job {os.environ['SLURM_GPUS_ON_NODE']} GPUs on this node but "
                "torch sees none: check the driver and torch's CUDA build (nvidia-smi, "
                "torch.version.cuda), or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        # SLURM and wrapper scripts can show a process only its own GPU, in ways that no variable
        # reveals; the rendezvous detects processes that share one. DeepSpeed reads LOCAL_RANK.
        os.environ["LOCAL_RANK"] = "0"
        local_rank = 0
    if local_rank >= count:
        raise UserError(
            f"process {local_rank + 1} of this machine has no GPU: {count} visible; start at "
            f"most {count} processes on it"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def gpu_identity(device: torch.device) -> str:
    """Equal for two processes of a machine only if they use the same GPU; "" for the CPU."""
    if device.type != "cuda":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[device.index or 0 :][:1]
    slices = [entry for entry in visible if entry.startswith("MIG-")]  # have their GPU's uuid
    return " ".join([str(torch.cuda.get_device_properties(device).uuid), *slices])


def _cpu_requested() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"
