"""Ranks as real processes that run a command line, without paying for the imports every time.

They are forked from the server process that has imported torch, DeepSpeed and megalr already, so a
start takes tenths of a second, and signals, exit codes and output are those of a real job.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.ranks import CONTEXT, become_rank, free_port, start_server

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "launchers" / "pretrain.py"
Hook = Callable[[int], None]


@dataclass
class Job:
    """Running ranks; ``outputs[r]`` is the file with what rank r prints."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def send(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, timeout: float = 120.0) -> list[int | None]:
        """Exit codes in rank order; -n: killed by signal n, None: killed now, for want of time."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """SIGKILL to all ranks at once, as far as they are alive."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self) -> str:
        """What all ranks have printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)


def start_ranks(
    folder: Path,
    arguments: Sequence[str],
    world_size: int = 2,
    script: Path = PRETRAIN,
    hook: Hook | None = None,
) -> Job:
    """Start ``script`` with ``arguments`` on some ranks; their output goes to files in ``folder``.

    ``hook(rank)`` (a function of a module) is called in each process before the script runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start_server()
    port = free_port()
    outputs = [folder / f"rank-{rank}.out" for rank in range(world_size)]
    processes: list[BaseProcess] = []
    for rank, output in enumerate(outputs):
        process = CONTEXT.Process(
            target=_rank,
            args=(rank, world_size, port, str(script), list(arguments), str(output), hook),
            daemon=True,
        )
        process.start()
        processes.append(process)
    return Job(processes, outputs)


def _rank(
    rank: int,
    world_size: int,
    port: int,
    script: str,
    arguments: list[str],
    output: str,
    hook: Hook | None,
) -> None:
    become_rank(rank, world_size, port)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    if hook is not None:
        hook(rank)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
