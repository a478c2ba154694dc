"""Start the ranks of a program on this machine: one process per GPU, signals and exit codes kept.

torchrun answers 1 whatever its ranks ended with, and both torchrun and deepspeed's launcher kill a
rank 30 seconds after a stop signal, while it may still be saving. Here a signal is only passed on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megalr.distributed.signals import STOPPED
from megalr.errors import UserError

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
POLL_SECONDS = 0.1
PEER_SECONDS = 30.0
"""How long the other ranks may take to end by themselves once one has failed."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: nothing may be loaded between fork and exec


class LocalRanks:
    """Ranks of one program on this machine, each in a session of its own.

    Args:
        program: words behind ``python``.
        ranks: number of processes.
        gpus: become CUDA_VISIBLE_DEVICES; empty: that stays as it is.
    """

    def __init__(self, program: Sequence[str], ranks: int, gpus: Sequence[str] = ()) -> None:
        self._command = [sys.executable, *program]
        self._ranks = ranks
        self._environment = _environment(ranks, gpus)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._received: list[int] = []

    def run(self) -> int:
        """Start the ranks and wait until all have ended. Main thread only.

        Each gets the variables of torchrun (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
        MASTER_ADDR, a free MASTER_PORT) and, unless it is set, its share of the processor's cores
        as OMP_NUM_THREADS. A signal of :data:`PASSED_ON` is passed on to every rank, once, and not
        acted on otherwise: the ranks decide how they end. When a rank has failed, the others are
        killed after PEER_SECONDS.

        Returns:
            The exit code of the first rank that failed, as a shell writes it (128 + n for signal
            n); else STOPPED if a rank was stopped; else 0.
        """
        heard = [n for n in PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            for rank in range(self._ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment = self._environment | own
                process = subprocess.Popen(
                    self._command,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches this process, which passes it on
                    preexec_fn=end_with_parent,
                )
                self._processes.append(process)
                for number in self._received:  # it came while they were being started
                    process.send_signal(number)
            return self._wait()
        finally:
            for process in self._processes:
                process.kill()  # does nothing to those that have ended
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> int:
        """Wait for all ranks, or for PEER_SECONDS after the first failure; the exit code."""
        alive = dict(enumerate(self._processes))
        failed, codes, deadline = 0, set(), float("inf")
        while alive and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            for rank, process in list(alive.items()):
                code = process.poll()
                if code is None:
                    continue
                del alive[rank]
                codes.add(code)
                if code not in (0, STOPPED) and not failed:
                    failed = code if code > 0 else 128 - code
                    deadline = time.monotonic() + PEER_SECONDS
                if code < 0 and -code not in self._received:
                    name = signal.Signals(-code).name
                    print(f"error: rank {rank} was killed by {name}", file=sys.stderr, flush=True)
        return failed or max(codes, default=0)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if number not in self._received:
            self._received.append(number)
            for process in self._processes:
                process.send_signal(number)


def end_with_parent() -> None:
    """In a new process: have the kernel send SIGTERM when its parent is killed, so that no run
    goes on unseen."""
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(ranks: int, gpus: Sequence[str]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // ranks))} | os.environ
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # asks the driver; makes no context
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[:count] or [str(number) for number in range(count)]


def choose_gpus(wanted: int | Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """The GPUs that ``--gpus`` names, of those that are ``there``.

    Args:
        wanted: how many, or which; None: all.
        there: as :func:`visible_gpus`.

    Raises:
        UserError: there are fewer, or a GPU is named twice or is not there.
    """
    if wanted is None:
        return list(there)
    if isinstance(wanted, int):
        if not 0 < wanted <= len(there):
            raise UserError(f"--gpus is {wanted}: this machine has {len(there)} that torch can use")
        return list(there[:wanted])
    for gpu in wanted:
        if gpu not in there or list(wanted).count(gpu) > 1:
            raise UserError(
                f"--gpus names {gpu!r}: give each GPU once; this machine has "
                f"{', '.join(there) if there else 'none that torch can use'}"
            )
    return list(wanted)
