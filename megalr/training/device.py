"""The device a rank computes on: waiting for it, compilation for it, its memory in use."""

from __future__ import annotations

import resource
from typing import Any

import torch

from megalr.kernels import HAS_TRITON


def wait_for(device: torch.device) -> None:
    """Wait until the device is idle, so that its work is not timed as part of what comes next."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CompileClock:
    """Seconds of compilation in this process, separately for torch.compile and custom kernels.

    Triton reports compilations to a listener, which the clock becomes, from version 3.4 on; before,
    and without Triton, ``kernel_seconds`` stays None. Programs found in a cache cost little.
    """

    def __init__(self) -> None:
        self.kernel_seconds: float | None = None
        if not HAS_TRITON:
            return
        import triton

        if hasattr(triton, "knobs"):
            self.kernel_seconds = 0.0
            self._before = triton.knobs.compilation.listener
            triton.knobs.compilation.listener = self._listen

    def _listen(self, **facts: Any) -> None:
        if self._before is not None:
            self._before(**facts)
        function = getattr(facts["src"], "fn", None)
        if getattr(function, "__module__", "").startswith("megalr."):  # else torch.compile's
            self.kernel_seconds += facts["times"].total / 1e6

    def metrics(self) -> dict[str, float | None]:
        """``compile_seconds`` of torch.compile, wall clock, all blocks; and ``kernel_seconds``."""
        from torch._dynamo.utils import calculate_time_spent

        seconds = float(calculate_time_spent()["total_wall_time"])
        return {"compile_seconds": seconds, "kernel_seconds": self.kernel_seconds}


def peak_memory_gib(device: torch.device, graphed: bool = False) -> float:
    """Peak memory so far, GiB: the CUDA allocator's; on a CPU, the process's resident memory.

    ``graphed``: a CUDA graph keeps memory that the allocator counts as used only during the
    capture, before the optimizer's states exist; the memory reserved from the device is given then.
    """
    if device.type == "cuda" and graphed:
        return torch.cuda.max_memory_reserved(device) / 2**30
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
