"""Causal attention of short sequences, rotary positions (RoPE) included, as one operator.

:func:`attention` is the operator for GPUs, forward and backward one Triton kernel each
(attention_triton). :func:`attention_reference` is the PyTorch reference, used in all other cases;
:func:`attention_applies` decides. In a step of a 1B model on an H200, rotations and conversions
around sdpa take nearly as long as attention itself (benchmarks/lab).

Shapes: B batch, S sequence, H heads, K key/value heads (K divides H: head h reads key head
h * K // H), D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from megalr.errors import UserError
from megalr.kernels import half_on_gpu, operator
from megalr.kernels.document_mask import AttentionMask, BlockMask, is_bounds, masked_attention

MAX_LENGTH = 512
"""Longer sequences go to scaled_dot_product_attention, whose kernels are designed for them: on
Hopper cuDNN's, the fastest of torch's at every length measured (benchmarks/lab)."""

HEAD_WIDTHS = (32, 64)
"""At 128 (7B) the kernels gain 3 % over torch's attention: not worth a second set of tile sizes."""

HOPPER = 9
"""Compute capability (H100, H200). For A100 the backward kernel spills most of its registers."""


def apply_rope(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Rotate ``x (B, H, S, D)`` by ``tables (2, S, W)`` in float32, in the dtype of x.

    Tables of each row of the batch by itself are ``(2, B, 1, S, W)``.
    The halves of the first W <= D dimensions become (x1 c - x2 s, x2 c + x1 s) (RoPE, arXiv
    2104.09864); the others stay.
    """
    width = tables.shape[-1]
    turned = x[..., :width].float()
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    y = (turned * tables[0] + rotated * tables[1]).to(x.dtype)
    if width == x.shape[-1]:
        return y
    # Side by side in memory as x: attention's output has this layout, else it would be copied.
    parts = (y.transpose(1, 2), x[..., width:].transpose(1, 2))
    return torch.cat(parts, dim=-1).transpose(1, 2)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    mask: AttentionMask,
    head_dim: int,
) -> torch.Tensor:
    """``softmax(rot(q) rot(k)^T / sqrt(D)) v`` by torch's scaled_dot_product_attention.

    Args:
        q: ``(B, S, H * D)``; k, v: ``(B, S, K * D)``, heads side by side.
        rope: tables as for :func:`apply_rope`, or None for no rotation.
        mask: ``(S, S)`` or ``(B, 1, S, S)``, True where a position may look; a BlockMask for
            torch's FlexAttention; None for causal attention.
        head_dim: D.

    Returns:
        ``(B, S, H * D)``, in the dtype of q.
    """
    grouped = q.shape[-1] != k.shape[-1]
    # (B, H|K, S, D) each
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    if isinstance(mask, BlockMask):
        y = masked_attention(q, k, v, mask, grouped)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    return y.transpose(1, 2).flatten(2)


@torch.compiler.assume_constant_result
def _capable(index: int | None) -> bool:
    """Whether the device is a GPU for which the configurations above were tuned."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] == HOPPER


def attention_applies(q: torch.Tensor, mask: AttentionMask, head_dim: int) -> bool:
    """Whether :func:`attention` takes this case; static, so that torch.compile has no graph break.

    It takes half precision, ``q (B, S, H * D)`` with S up to ``MAX_LENGTH`` on a Hopper GPU, and no
    mask but the causal one, or that of documents in the form of document_bounds.
    """
    return (
        (mask is None or is_bounds(mask))
        and half_on_gpu(q)
        and head_dim in HEAD_WIDTHS
        and 0 < q.shape[1] <= MAX_LENGTH
        and q.shape[0] > 0
        and _capable(q.device.index)
    )


def attention(
    projections: Sequence[torch.Tensor],
    rope: torch.Tensor | None,
    head_dim: int,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention by the kernels: :func:`attention_reference` without a mask.

    Rotation in float32, rounded to the dtype of q; scores and softmax in float32; probabilities
    rounded for the product with v. Gradients are summed in float32 too and rounded once, after the
    rotation back (autograd of the reference rounds before it as well). No sum is atomic: results
    are the same bits on every run. ``rope`` must be as wide as a head and hold the same angles in
    both halves, as the tables of models.rope do.

    Args:
        projections: q, k, v with shapes as in attention_reference, any stride of B and S; or one
            tensor of them, ``(3, B, S, H * D)``, whose gradient is then one tensor too.
        rope: ``(2, S, D)``, or None.
        head_dim: D.
        documents: ``(3, B, S)`` int32 of document_mask.document_bounds: the keys that a query sees,
            and the rows of ``rope`` that belong to each position; None: a row is one document.

    Raises:
        UserError: shapes, dtypes or tables do not match.
    """
    return torch.ops.megalr.causal_attention(list(projections), rope, head_dim, documents)[0]


def _three(
    projections: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v."""
    q, k, v = projections[0] if len(projections) == 1 else projections
    return q, k, v


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    D: int,
    documents: torch.Tensor | None,
) -> None:
    if D not in HEAD_WIDTHS:
        raise UserError(f"head width {D}: the kernels take {HEAD_WIDTHS}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.dtype != k.dtype or k.dtype != v.dtype:
        kinds = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise UserError(f"q, k, v do not fit each other: {kinds}")
    if q.shape[2] % D or k.shape[2] % D or q.shape[2] % k.shape[2]:
        raise UserError(f"widths {q.shape[2]} of q and {k.shape[2]} of k for heads of {D}")
    if rope is not None and (rope.shape != (2, q.shape[1], D) or rope.dtype != torch.float32):
        raise UserError(f"tables {tuple(rope.shape)} {rope.dtype}, need {(2, q.shape[1], D)}")
    if documents is not None and (documents.shape != (3, *q.shape[:2]) or not is_bounds(documents)):
        raise UserError(
            f"documents {tuple(documents.shape)} {documents.dtype}, need {(3, *q.shape[:2])} int32"
        )


# Schemas are written out because torch 2.6 cannot infer them from string annotations.
@operator(
    "causal_attention",
    schema="(Tensor[] projections, Tensor? rope, int head_dim, Tensor? documents)"
    " -> (Tensor, Tensor)",
)
def _forward(
    projections: Sequence[torch.Tensor],
    rope: torch.Tensor | None,
    head_dim: int,
    documents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _three(projections)
    _check(q, k, v, rope, head_dim, documents)
    from megalr.kernels.attention_triton import launch_forward

    return launch_forward(q, k, v, rope, head_dim, documents=documents)


@operator(
    "causal_attention_backward",
    schema="(Tensor do, Tensor[] projections, Tensor? rope, Tensor o, Tensor lse, int head_dim,"
    " Tensor? documents) -> Tensor[]",
)
def _backward(
    do: torch.Tensor,
    projections: Sequence[torch.Tensor],
    rope: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    head_dim: int,
    documents: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients in the form of the projections, three tensors or one."""
    from megalr.kernels.attention_backward_triton import launch_backward

    grads = [x.new_empty(x.shape) for x in projections]
    inputs = (*_three(projections), rope, o, lse, head_dim)
    launch_backward(do, *inputs, out=_three(grads), documents=documents)
    return grads


@torch.library.register_fake(_forward)
def _(
    projections: Any, rope: Any, head_dim: int, documents: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, width = projections[0].shape[-3:]
    lse = projections[0].new_empty((B, width // head_dim, S), dtype=torch.float32)
    return projections[0].new_empty((B, S, width)), lse


@torch.library.register_fake(_backward)
def _(
    do: Any, projections: Any, rope: Any, o: Any, lse: Any, head_dim: int, documents: Any
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in projections]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    projections, rope, ctx.head_dim, documents = inputs
    ctx.save_for_backward(rope, documents, *output, *projections)
    ctx.set_materialize_grads(False)  # no zeros for lse, which has no gradient


def _gradients(
    ctx: Any, do: torch.Tensor | None, _: None
) -> tuple[list[torch.Tensor | None] | None, None, None, None]:
    rope, documents, o, lse, *projections = ctx.saved_tensors
    if do is None:
        return [None] * len(projections), None, None, None
    grads = torch.ops.megalr.causal_attention_backward(
        do, projections, rope, o, lse, ctx.head_dim, documents
    )
    return grads, None, None, None


torch.library.register_autograd(_forward, _gradients, setup_context=_setup_context)


def _product_flops(o: Sequence[int]) -> int:
    """FLOPs of one product of S by S scores; o is the shape ``(B, S, H * D)``."""
    return 2 * o[0] * o[1] * o[1] * o[2]


# torch.utils.flop_counter cannot see inside a custom operator. Masked scores count, as in torch's
# formula for scaled_dot_product_attention.
@register_flop_formula(torch.ops.megalr.causal_attention)
def _forward_flops(projections: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return 2 * _product_flops(projections[0][-3:])


@register_flop_formula(torch.ops.megalr.causal_attention_backward)
def _backward_flops(do: Sequence[int], *_: Any, **__: Any) -> int:
    return 5 * _product_flops(do)
