"""Bytes that forward keeps for backward, and what head and backward need besides.

Counted per token and block in elements of the compute precision, h hidden width, f MLP width, r
rank, with equal numbers of heads:

=================================  =====================  =====================
kept by a block                    factors                one stacked GEMM
=================================  =====================  =====================
its input, both norms' outputs,
the input of the second norm       4 h                    4 h
q and k turned, v, output          4 h                    6 h: v is a part of
                                                          the stack q, k, v
bottlenecks                        7 r                    0
gate, up and their product         3 f                    3 f
without torch.compile also silu    f                      f
=================================  =====================  =====================

These are the tensors that torch's autograd keeps of a compiled block (found by looking at the saved
tensors); whole runs agree to 1 % (docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalr.estimate.tensors import MatrixGroup, matrix_groups
from megalr.layers.head import CHUNK_BYTES
from megalr.models.config import DecoderConfig
from megalr.parallel.plan import Plan

LIBRARIES = 80 * 2**20
"""Bytes of workspace of the GPU libraries inside the allocator: what is left of recorded peaks."""


@dataclass(frozen=True)
class Shape:
    """How a micro-batch is computed.

    Attributes:
        tokens: micro-batch size times sequence length.
        element: bytes of a number of the compute precision.
        compiled: ``train.compile``.
        recompute: ``train.activation_checkpointing``, one of models.recompute.LEVELS.
    """

    tokens: int
    element: int
    compiled: bool
    recompute: str


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one micro-batch.

    Attributes:
        kept: by all blocks for backward.
        work: the larger of what the head and what the backward pass of a block need for a moment.
    """

    kept: int
    work: int


def activation_bytes(
    sizes: DecoderConfig, method: Any, plan: Plan, shape: Shape
) -> ActivationBytes:
    """Activations of a micro-batch on one rank."""
    groups = matrix_groups(sizes, method, plan)
    token = block_elements(sizes, method, plan, groups, shape.compiled)
    heads = sizes.num_heads // plan.mesh.tensor_size
    # Besides the elements: log-sum-exp of attention and the norms' scales, float32.
    block = shape.tokens * (token * shape.element + 4 * (heads + 2))
    residual = sizes.hidden_size // (plan.mesh.tensor_size if plan.cut_residual else 1)
    kept = block
    if shape.recompute != "none":
        kept = shape.tokens * shape.element * kept_elements(sizes, method, plan, groups, shape)
        kept += shape.tokens * 4 * heads if shape.recompute in ("elementwise", "mlp") else 0
    kept *= sizes.num_layers
    working = 0 if shape.recompute == "none" else block
    f = groups[2].local_rows[0]
    backward = shape.tokens * (3 * f + 2 * residual) * shape.element + working
    head = head_bytes(sizes, plan, shape)
    return ActivationBytes(int(kept), int(max(backward, head)) + LIBRARIES)


def block_elements(
    sizes: DecoderConfig, method: Any, plan: Plan, groups: list[MatrixGroup], compiled: bool
) -> float:
    """Elements a token that a block keeps, as in the table above."""
    t = plan.mesh.tensor_size
    h, kv = sizes.hidden_size / t, sizes.kv_heads * sizes.head_dim / t
    f = groups[2].local_rows[0]
    residual = sizes.hidden_size / (t if plan.cut_residual else 1)
    count = 4 * residual + 2 * h + 2 * kv
    if not groups[0].factorized or method.name == "sltrain":
        # q, k, v come from one GEMM: v keeps the whole stack alive beside the turned q and k.
        count += h + kv
    count += (3 if sizes.gated_mlp else 2) * f
    if not compiled:
        count += f  # the activation's output
    if method.name != "sltrain":
        both = method.name == "cola" and not compiled  # before and after the nonlinearity
        count += _bottleneck_elements(method, groups) * (2 if both else 1)
    return count


def kept_elements(
    sizes: DecoderConfig, method: Any, plan: Plan, groups: list[MatrixGroup], shape: Shape
) -> float:
    """Elements a token that a block keeps where something is recomputed (models.recompute)."""
    t = plan.mesh.tensor_size
    residual = sizes.hidden_size / (t if plan.cut_residual else 1)
    # q, k, v and what attention gives
    attention = 2 * (sizes.hidden_size + sizes.kv_heads * sizes.head_dim) / t
    between = 0 if method.name == "sltrain" else _bottleneck_elements(method, groups)
    if shape.recompute == "full":
        return residual
    if shape.recompute == "bottleneck":
        return residual + between
    if shape.recompute == "mlp":
        return residual + attention + between
    projections = (2 if sizes.gated_mlp else 1) * groups[2].local_rows[0]
    return 2 * residual + attention + projections + between


def _bottleneck_elements(method: Any, groups: list[MatrixGroup]) -> int:
    """Numbers a token between the factors of a block: 7 r."""
    return sum(len(g.rows) for g in groups if g.factorized) * getattr(method, "rank", 0)


def head_bytes(sizes: DecoderConfig, plan: Plan, shape: Shape) -> float:
    """Bytes while the head works: a chunk of logits, its loss, gradients of input and weight."""
    rows, h = sizes.padded_vocab_size // plan.mesh.tensor_size, sizes.hidden_size
    largest = max(1, CHUNK_BYTES // (rows * shape.element))
    chunk = -(-shape.tokens // -(-shape.tokens // largest))
    logits = chunk * rows
    weight = rows * h * (4 + shape.element)  # the float32 sum and the chunk's own product
    # Not compiled, the loss keeps four float32 arrays of the chunk's size at a time.
    arrays = logits * (shape.element if shape.compiled else shape.element + 16)
    return arrays + weight + 3 * shape.tokens * h * shape.element
