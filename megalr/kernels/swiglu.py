"""SwiGLU (arXiv 2002.05202) and the matrix product that follows it, as one operator.

``y = (silu(gate) up) W^T``: autograd keeps gate, up and, for the gradient of W, their product, f
numbers per token each. Here the backward kernel, which reads gate and up anyway, computes the
product once more, in the memory of its gradient: a third less is kept, for one more write of f
numbers per token. W is the matrix ``down`` or, if it is factorized, its factor A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megalr.kernels import half_on_gpu, operator, widened

# Written out because torch 2.6 infers no schema from a returned list of tensors.
_BACKWARD = "(Tensor dy, Tensor[] projections, Tensor w) -> (Tensor[], Tensor)"


@operator("swiglu_product")
def swiglu_product(projections: Sequence[Tensor], w: Tensor) -> Tensor:
    """``(silu(gate) up) W^T``.

    Args:
        projections: gate and up, ``(..., f)`` each, or one tensor of both:
            ``(..., 2 f)`` side by side or ``(2, ..., f)``.
        w: ``(m, f)``.

    Returns:
        ``(..., m)``, in the dtype of w. The elementwise part is float32, rounded once.
    """
    gate, up = _rows(projections, w)  # (N, f)
    if half_on_gpu(gate):
        from megalr.kernels.swiglu_triton import swiglu_forward

        hidden = swiglu_forward(gate, up)
    else:
        hidden = (F.silu(widened(gate)) * widened(up)).to(gate.dtype)
    return (hidden @ w.t()).view(*_leading(projections, w), w.shape[0])


@torch.library.register_fake(swiglu_product)
def _(projections: Sequence[Tensor], w: Tensor) -> Tensor:
    return w.new_empty(*_leading(projections, w), w.shape[0])


@operator("swiglu_product_backward", schema=_BACKWARD)
def swiglu_product_backward(
    dy: Tensor, projections: Sequence[Tensor], w: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the projections, in the same form, and of W."""
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in projections]
    (gate, up), (dgate, dup) = _rows(projections, w), _rows(grads, w)
    flat = dy.reshape(-1, w.shape[0])  # (N, m)
    hidden = flat @ w  # (N, f), the gradient of silu(gate) up; the kernel overwrites it
    if half_on_gpu(gate):
        from megalr.kernels.swiglu_triton import swiglu_backward_

        swiglu_backward_(gate, up, hidden, dgate, dup)
    else:
        _backward_reference_(gate, up, hidden, dgate, dup)
    return grads, flat.t() @ hidden


@torch.library.register_fake(swiglu_product_backward)
def _(dy: Tensor, projections: Sequence[Tensor], w: Tensor) -> tuple[list[Tensor], Tensor]:
    contiguous = torch.contiguous_format
    grads = [torch.empty_like(p, memory_format=contiguous) for p in projections]
    return grads, torch.empty_like(w)


def _backward_reference_(
    gate: Tensor, up: Tensor, hidden: Tensor, dgate: Tensor, dup: Tensor
) -> None:
    """PyTorch reference of the backward kernel, in place of ``hidden``, ``dgate`` and ``dup``."""
    g, u, d = widened(gate), widened(up), widened(hidden)
    s = torch.sigmoid(g)
    dup.copy_(d * g * s)
    dgate.copy_(d * u * (s + g * s * (1 - s)))
    hidden.copy_(g * s * u)


def _is_stacked(projections: Sequence[Tensor], w: Tensor) -> bool:
    """Whether the projections are one tensor ``(2, ..., f)``."""
    return len(projections) == 1 and projections[0].shape[-1] == w.shape[1]


def _leading(projections: Sequence[Tensor], w: Tensor) -> tuple[int, ...]:
    """The dimensions before f."""
    return projections[0].shape[1:-1] if _is_stacked(projections, w) else projections[0].shape[:-1]


def _rows(projections: Sequence[Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up as ``(N, f)`` each, views where possible."""
    if _is_stacked(projections, w):
        gate, up = projections[0].reshape(2, -1, w.shape[1])
        return gate, up
    flat = [p.reshape(-1, p.shape[-1]) for p in projections]
    gate, up = flat if len(flat) == 2 else flat[0].chunk(2, dim=-1)
    return gate, up


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    projections, w = inputs
    ctx.save_for_backward(*projections, w)


def _backward(ctx: Any, dy: Tensor) -> tuple[list[Tensor], Tensor]:
    *projections, w = ctx.saved_tensors
    return swiglu_product_backward(dy, projections, w)


torch.library.register_autograd(swiglu_product, _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megalr.swiglu_product)
def _flops(projections: Any, w: Any, *_: Any, **__: Any) -> int:
    numbers = sum(math.prod(size) for size in projections)  # 2 f per token
    return numbers * w[0]


@register_flop_formula(torch.ops.megalr.swiglu_product_backward)
def _backward_flops(dy: Any, projections: Any, w: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(projections, w)
