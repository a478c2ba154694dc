"""Kernels of our own for GPUs; each has a plain PyTorch twin that computes the same."""

import importlib.util
from functools import cache

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the kernels can be compiled; torch for CUDA brings Triton."""


def half_on_gpu(x: torch.Tensor) -> bool:
    """Whether kernels for half precision run on x: on a CUDA device, and there is Triton."""
    return HAS_TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 at least, in which the twins compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere, where Triton's interpreter takes programs one by one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
