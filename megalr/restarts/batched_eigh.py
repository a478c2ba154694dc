"""Symmetric eigenproblems of a batch, several at a time on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

STREAMS = 4
"""Measured on an H200: four at a time take 0.45, 0.60 and 0.72 of the time of one by one at rank
128, 256 and 512; one batched call gains nothing."""


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k, r), ascending, and eigenvectors (k, r, r) of symmetric ``matrices``.

    The solver launches many small kernels and waits for some of them, so on a GPU the batch is
    shared out over threads with a stream each. All work is ordered after what the current stream
    had to do, and before what it does next.
    """
    count = min(STREAMS, matrices.shape[0])
    if matrices.device.type != "cuda" or count < 2:
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    current = torch.cuda.current_stream(matrices.device)
    streams = _streams(matrices.device)[:count]

    def solve(part: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        with torch.cuda.device(matrices.device), torch.cuda.stream(stream), torch.no_grad():
            stream.wait_stream(current)
            values, vectors = torch.linalg.eigh(part)
            for tensor in (values, vectors):  # made on this stream, read on the current one
                tensor.record_stream(current)
            return values, vectors

    with ThreadPoolExecutor(count) as pool:
        solved = list(pool.map(solve, matrices.tensor_split(count), streams))
    for stream in streams:
        current.wait_stream(stream)
    return torch.cat([values for values, _ in solved]), torch.cat([v for _, v in solved])


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The same ones in every call: the allocator gives nothing of one stream's memory to another,
    so with new streams every restart would reserve memory of its own."""
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS))
