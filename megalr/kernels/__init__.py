"""Custom GPU kernels in Triton, each with a PyTorch reference that computes the same.

In: tensors. Out: tensors, through differentiable operators. Must not know layers, models or
sharding. ``X.py`` holds operator, reference and choice between them, ``X_triton.py`` the kernels.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

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


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function as the operator ``megalr::name``, on every device.

    It must change no argument and return no view of one (``torch.library.opcheck`` tests both).
    ``torch.library.custom_op`` tests that in every call, which takes the host longer than many a
    kernel takes the GPU.

    Args:
        name: without its namespace.
        schema: arguments and results; None: from the annotations.

    Returns:
        Of the decorator: the operator, for calls, ``torch.library.register_fake`` and
        ``torch.library.register_autograd``.
    """

    def define(function: Callable[..., Any]) -> Any:
        qualified = f"megalr::{name}"
        signature = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", function)
        return getattr(torch.ops.megalr, name).default

    return define
