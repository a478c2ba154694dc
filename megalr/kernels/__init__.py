"""Custom GPU kernels in Triton, each with a PyTorch reference that computes the same.

In: tensors. Out: tensors, through differentiable operators. Must not know layers, models or
sharding. ``X.py`` holds operator, reference and choice between them, ``X_triton.py`` the kernels.
"""

import importlib.util
from functools import cache

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the kernels can be compiled; torch for CUDA installs Triton."""


def half_on_gpu(x: torch.Tensor) -> bool:
    """Whether the half-precision kernels take x: bf16 or fp16 on a CUDA device, with Triton."""
    return HAS_TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or wider if it is: the dtype in which the references compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where Triton's interpreter runs one program a time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
