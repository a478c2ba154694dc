"""Causal attention of short sequences with rotary positions (RoPE) inside, as one operator.

:func:`attention` is the operator for GPUs, forward and backward one Triton kernel each (see
attention_triton); :func:`plain_attention` is the same in plain PyTorch, for all other cases;
:func:`applies` says which. In an H200's step of a 1B model, rotations and
conversions around sdpa take nearly as long as attention itself (benchmarks/lab).

Shapes: B batch, S sequence, H heads, K key/value heads (K divides H: head h reads key head
h * K // H), D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from megalr.errors import UserError
from megalr.kernels import half_on_gpu, multiprocessors

MAX_LENGTH = 512
"""Longer sequences go to scaled_dot_product_attention, whose kernels are made for them."""

HEAD_WIDTHS = (32, 64)
"""At 128 (7B) the kernels gain 3 % over torch's attention: not worth a second set of cuts."""

HOPPER = 9
"""Compute capability (H100, H200). For A100 the backward kernel spills most of its registers."""


@dataclass(frozen=True)
class Forward:
    """How the forward kernel is cut: queries and keys in a block, warps, pipeline stages.

    registers: the most a thread may use, None for no limit of ours. Fewer means more blocks at once
    on a multiprocessor.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Backward:
    """How the backward kernel is cut; ``keys`` is a multiple of ``queries``.

    programs: how many a multiprocessor gets; each has its own scratch.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None


FORWARD = {
    32: Forward(64, 64, 4, 1, 128),
    64: Forward(64, 64, 4, 1, 128),
}
BACKWARD = {
    32: Backward(64, 64, 4, 1, 2),
    64: Backward(64, 64, 4, 1, 2),
}
"""By head width, for sequences of more than 64 tokens."""


def forward_choice(D: int, S: int) -> Forward:
    """The forward kernel's blocks for a head width and a length."""
    return FORWARD[D] if S > 64 else Forward(64, 64, 4, 1)


def backward_choice(D: int, S: int) -> Backward:
    """The backward kernel's blocks for a head width and a length."""
    return BACKWARD[D] if S > 64 else Backward(32, 64, 4, 1, 2)


def apply_rope(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Rotate ``x (B, H, S, D)`` in float32: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * tables[0] + rotated * tables[1]).to(x.dtype)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    mask: torch.Tensor | None,
    head_dim: int,
) -> torch.Tensor:
    """``softmax(rot(q) rot(k)^T / sqrt(D)) v`` by torch's scaled_dot_product_attention.

    Args:
        q: ``(B, S, H * D)``; k, v: ``(B, S, K * D)``, heads side by side.
        rope: tables ``(2, S, D)`` float32 of cosines and sines, or None for no rotation.
        mask: ``(S, S)``, True where a position may look; None for causal attention.
        head_dim: D.

    Returns:
        ``(B, S, H * D)``.
    """
    grouped = q.shape[-1] != k.shape[-1]
    # (B, H|K, S, D) each
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return y.transpose(1, 2).flatten(2)


@torch.compiler.assume_constant_result
def _capable(index: int | None) -> bool:
    """Whether the device is a GPU that the configurations above were chosen for."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] == HOPPER


def applies(q: torch.Tensor, mask: torch.Tensor | None, head_dim: int) -> bool:
    """Whether :func:`attention` takes this case; a static fact, so torch.compile does not break.

    That is: half precision, ``q (B, S, H * D)`` with S up to ``MAX_LENGTH`` on a Hopper GPU, and no
    mask but the causal one.
    """
    return (
        mask is None
        and half_on_gpu(q)
        and head_dim in HEAD_WIDTHS
        and 0 < q.shape[1] <= MAX_LENGTH
        and q.shape[0] > 0
        and _capable(q.device.index)
    )


def attention(
    projections: Sequence[torch.Tensor], rope: torch.Tensor | None, head_dim: int
) -> torch.Tensor:
    """Causal attention by the kernels: what :func:`plain_attention` computes without a mask.

    Rotation in float32, rounded to the dtype of q; scores and softmax in float32; probabilities
    rounded for the product with v. The gradients' sums are float32 too, rounded once, after the
    rotation back (plain autograd rounds before as well). Sums are never atomic: a repetition gives
    the same bits. ``rope`` must hold the same angles in both halves of D, as decoder.rope_tables
    does.

    Args:
        projections: q, k, v with shapes as in plain_attention, any stride of B and S; or one tensor
            of them, ``(3, B, S, H * D)``, whose gradient is then one tensor too.
        rope, head_dim: as in plain_attention.

    Raises:
        UserError: shapes, dtypes or tables do not fit each other.
    """
    return torch.ops.megalr.causal_attention(list(projections), rope, head_dim)[0]


def _three(
    projections: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v."""
    q, k, v = projections[0] if len(projections) == 1 else projections
    return q, k, v


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: torch.Tensor | None, D: int
) -> None:
    if D not in HEAD_WIDTHS:
        raise UserError(f"head width {D}: the kernels know {HEAD_WIDTHS}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.dtype != k.dtype or k.dtype != v.dtype:
        kinds = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise UserError(f"q, k, v do not fit each other: {kinds}")
    if q.shape[2] % D or k.shape[2] % D or q.shape[2] % k.shape[2]:
        raise UserError(f"widths {q.shape[2]} of q and {k.shape[2]} of k for heads of {D}")
    if rope is not None and (rope.shape != (2, q.shape[1], D) or rope.dtype != torch.float32):
        raise UserError(f"tables {tuple(rope.shape)} {rope.dtype}, need {(2, q.shape[1], D)}")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension is contiguous, as the kernels read it; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    head_dim: int,
    choice: Forward | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o ``(B, S, H * D)`` and ``(B, H, S)`` float32, log2 of the sums of exp(scores).

    ``choice`` replaces the configuration of the table above.
    """
    _check(q, k, v, rope, head_dim)
    from megalr.kernels.attention_triton import forward_kernel

    (B, S, width), D = q.shape, head_dim
    H, group = width // D, width // k.shape[2]
    choice = choice or forward_choice(D, S)
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = q.new_empty(B, S, width)
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    with torch.cuda.device_of(q):
        forward_kernel[(-(-S // choice.queries) * H * B,)](
            q, k, v, None if rope is None else rope.contiguous(), o, lse,
            q.stride(0), k.stride(0), v.stride(0), math.log2(math.e) / math.sqrt(D), S,
            q_stride=q.stride(1), k_stride=k.stride(1), v_stride=v.stride(1), H=H, GROUP=group,
            D=D, M=choice.queries, N=choice.keys,
            ROPE=rope is not None, EVEN=S % max(choice.queries, choice.keys) == 0,
            num_warps=choice.warps, num_stages=choice.stages, maxnreg=choice.registers,
        )  # fmt: skip
    return o, lse


def launch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    head_dim: int,
    choice: Backward | None = None,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of q, k, v, contiguous, from do ``(B, S, H * D)`` and launch_forward's results.

    ``choice`` replaces the configuration of the table above; ``into``: memory for the results.
    """
    from megalr.kernels.attention_triton import backward_kernel

    (B, S, width), D = q.shape, head_dim
    group, K = width // k.shape[2], k.shape[2] // D
    choice = choice or backward_choice(D, S)
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    dq, dk, dv = into or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    programs = min(B * K, multiprocessors(q.device) * choice.programs)
    blocks = -(-S // choice.keys)
    padded = blocks * choice.keys
    deltas = q.new_empty(programs, group, padded, dtype=torch.float32)
    # With one block of keys every pair is on the diagonal, and no sum has to wait.
    waiting = padded if blocks > 1 else 0
    sums = q.new_empty(programs, group, waiting, D, dtype=torch.float32)
    with torch.cuda.device_of(q):
        backward_kernel[(programs,)](
            q, k, v, None if rope is None else rope.contiguous(), o, lse, do, dq, dk, dv,
            deltas, sums, q.stride(0), k.stride(0), v.stride(0), do.stride(0),
            1 / math.sqrt(D), math.log2(math.e) / math.sqrt(D), S, B * K,
            q_stride=q.stride(1), k_stride=k.stride(1), v_stride=v.stride(1),
            do_stride=do.stride(1), K=K, GROUP=group, D=D, M=choice.queries, N=choice.keys,
            ROPE=rope is not None, EVEN=S % choice.keys == 0,
            num_warps=choice.warps, num_stages=choice.stages, maxnreg=choice.registers,
        )  # fmt: skip
    return dq, dk, dv


# Schemas are spelt out because torch 2.6 does not read annotations that are strings.
@torch.library.custom_op(
    "megalr::causal_attention",
    mutates_args=(),
    schema="(Tensor[] projections, Tensor? rope, int head_dim) -> (Tensor, Tensor)",
)
def _forward(
    projections: Sequence[torch.Tensor], rope: torch.Tensor | None, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_forward(*_three(projections), rope, head_dim)


@torch.library.custom_op(
    "megalr::causal_attention_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor[] projections, Tensor? rope, Tensor o, Tensor lse, int head_dim)"
    " -> Tensor[]",
)
def _backward(
    do: torch.Tensor,
    projections: Sequence[torch.Tensor],
    rope: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    head_dim: int,
) -> list[torch.Tensor]:
    """Gradients in the form that the projections came in."""
    grads = [x.new_empty(x.shape) for x in projections]
    launch_backward(do, *_three(projections), rope, o, lse, head_dim, into=_three(grads))
    return grads


@_forward.register_fake
def _(projections: Any, rope: Any, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, width = projections[0].shape[-3:]
    lse = projections[0].new_empty((B, width // head_dim, S), dtype=torch.float32)
    return projections[0].new_empty((B, S, width)), lse


@_backward.register_fake
def _(do: Any, projections: Any, rope: Any, o: Any, lse: Any, head_dim: int) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in projections]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    projections, rope, ctx.head_dim = inputs
    ctx.save_for_backward(rope, *output, *projections)
    ctx.set_materialize_grads(False)  # no zeros for lse, which nobody differentiates


def _gradients(
    ctx: Any, do: torch.Tensor | None, _: None
) -> tuple[list[torch.Tensor | None] | None, None, None]:
    rope, o, lse, *projections = ctx.saved_tensors
    if do is None:
        return [None] * len(projections), None, None
    grads = torch.ops.megalr.causal_attention_backward(do, projections, rope, o, lse, ctx.head_dim)
    return grads, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _product_flops(o: Sequence[int]) -> int:
    """FLOPs of one product of S by S scores; o is the shape ``(B, S, H * D)``."""
    return 2 * o[0] * o[1] * o[1] * o[2]


# torch.utils.flop_counter cannot see inside an operator; it is told what happens there, with the
# masked scores counted as torch does for scaled_dot_product_attention.
@register_flop_formula(torch.ops.megalr.causal_attention)
def _forward_flops(projections: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return 2 * _product_flops(projections[0][-3:])


@register_flop_formula(torch.ops.megalr.causal_attention_backward)
def _backward_flops(do: Sequence[int], *_: Any, **__: Any) -> int:
    return 5 * _product_flops(do)
