"""The device a rank computes on: its name, its peak, the memory in use."""

from __future__ import annotations

import resource

import torch

PEAK_BF16_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bf16 tensor-core peak by exact device name, from the vendor's datasheets. A device that is
not here has no MFU: a guess would be wrong in silence."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device for the run's precision, None when it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))


def wait_for(device: torch.device) -> None:
    """Let the device finish, so that its time is not counted as what comes next."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compile_seconds() -> float:
    """Seconds that torch.compile has worked in this process, finding results in its cache included.

    Of wall clock, forward and backward graphs of all blocks; 0 if nothing was compiled.
    """
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent()["total_wall_time"])


def peak_memory_gib(device: torch.device, graphed: bool = False) -> float:
    """Most memory used so far, GiB: the CUDA allocator's peak, on a CPU the process' resident.

    ``graphed``: a CUDA graph keeps memory that the allocator counts as used during its capture
    only, before the optimizer's states exist; what was reserved from the device is given then.
    """
    if device.type == "cuda" and graphed:
        return torch.cuda.max_memory_reserved(device) / 2**30
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
