"""Run a function on several gloo ranks, keeping the workers alive between calls.

``run_distributed(fn, 2, *args)`` calls ``fn(*args)`` on two processes that form one
torch.distributed world and returns what each rank returned, in rank order. Starting a process that
imports torch and DeepSpeed costs seconds, so the workers of each world size stay for later calls.
If a rank fails its traceback is raised; if its peers do not answer then (they may be stuck in a
collective), the workers of that world are ended and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "megalr.training.pretrain"])
_POOLS: dict[int, _Pool] = {}
ON_THE_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Workers use no GPU: there may be fewer than ranks, and what they compare is meant for a CPU."""

PEER_SECONDS = 10.0
"""How long the other ranks have to answer once one has failed."""


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server() -> None:
    """Start the server of the workers; DeepSpeed looks for a GPU when it is imported there."""
    with patch.dict(os.environ, ON_THE_CPU):
        forkserver.ensure_running()


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Set the variables that a launcher on one machine gives to a rank, on the CPU."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        **ON_THE_CPU,
    )


def _worker(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    become_rank(rank, world_size, port)
    import gc
    import warnings

    import deepspeed
    import torch

    from megalr.engine.build import import_deepspeed

    import_deepspeed()
    warnings.simplefilter("ignore")  # DeepSpeed calls what torch has renamed since
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    linear = torch.nn.functional.linear
    # DeepSpeed collects garbage several times for an engine, 3 s in all if it goes through torch.
    gc.freeze()
    while (job := pipe.recv()) is not None:
        function, args = job
        # An engine with tensor parallelism leaves its mesh in a global of DeepSpeed.
        deepspeed.utils.groups.mpu = None
        # One at stage 3 with DeepSpeed's defaults replaces this for the whole process.
        torch.nn.functional.linear = linear
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        # Finalizers of the last engine run here. Those that import something, in the middle of
        # another import, break it in Python 3.11 (KeyError in importlib, CPython issue 106176).
        gc.collect()
    torch.distributed.destroy_process_group()


class _Pool:
    def __init__(self, world_size: int) -> None:
        start_server()
        port = free_port()
        self.stuck = False
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_worker, args=(rank, world_size, port, there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple, timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(self.pipes):
            missing = [i for i in range(len(self.pipes)) if i not in results and i not in failures]
            ready = wait([self.pipes[i] for i in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stuck = True
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    succeeded, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.stuck, succeeded, value = True, False, "died without a word"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    # Peers either fail as well or wait in a collective that will never end.
                    deadline = min(deadline, time.monotonic() + PEER_SECONDS)
        if failures:
            rank = min(failures)
            raise RankFailed(f"rank {rank}:\n{failures[rank]}")
        if self.stuck:
            raise RankFailed(f"ranks {missing} did not finish within {timeout:.0f} s")
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """``[function(*args) on rank 0, ... on rank world_size - 1]``; raises RankFailed."""
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = _Pool(world_size)
    try:
        return pool.run(function, args, timeout)
    except BaseException as error:
        if pool.stuck or not isinstance(error, RankFailed):
            _POOLS.pop(world_size).close()
        raise


@atexit.register
def _close_pools() -> None:
    while _POOLS:
        _POOLS.popitem()[1].close()
