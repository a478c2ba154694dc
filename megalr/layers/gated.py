"""The input of an MLP's second matrix, before its elementwise part has been computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megalr.kernels.swiglu import swiglu_product


@dataclass(frozen=True)
class DeferredSwiGLU:
    """``silu(gate) up``, not formed yet: a layer that reads it multiplies in the same operator.

    Attributes:
        projections: gate and up, or one tensor of both (kernels.swiglu).
    """

    projections: tuple[torch.Tensor, ...]


def product(x: torch.Tensor | DeferredSwiGLU, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T``."""
    if isinstance(x, DeferredSwiGLU):
        return swiglu_product(list(x.projections), weight)
    return F.linear(x, weight)
