"""Device time of a piece of work, as it is inside a CUDA graph, and the memory it takes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megalr.errors import UserError

WORKS_A_GRAPH, REPLAYS = 4, 15


def cuda_device() -> str:
    """Name of the GPU that is measured.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        program = Path(sys.argv[0]).name
        raise UserError(f"benchmarks/{program} measures CUDA devices, and there is none here")
    return torch.cuda.get_device_name()


def milliseconds(work: Callable[[], object]) -> float:
    """Device time of one call, the median over replays of a graph of several."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels, fills cuBLAS's workspaces
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(WORKS_A_GRAPH):
            work()
    graph.replay()
    return _median(graph.replay)


def milliseconds_eager(work: Callable[[], object]) -> float:
    """The same, launched by the host: for work that waits for the device, which no graph holds."""

    def works() -> None:
        for _ in range(WORKS_A_GRAPH):
            work()

    works()
    return _median(works)


def _median(works: Callable[[], object]) -> float:
    """Milliseconds of one of the WORKS_A_GRAPH pieces that a call does."""
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        works()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / WORKS_A_GRAPH)
    return statistics.median(times)


def peak_mib(work: Callable[[], object]) -> float:
    """Most memory that a call holds at a time beyond its operands."""
    work()  # cuBLAS's workspace is no part of it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def attempt(measure: Callable[[], float]) -> float | str:
    """A number, or in one line why there is none."""
    try:
        return round(measure(), 4)
    except Exception as error:  # whatever one way does, the others are to be measured
        return f"{type(error).__name__}: {error}".splitlines()[0]
