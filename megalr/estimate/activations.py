"""Bytes of activations saved for backward, and the temporary memory of head and backward.

Elements per token and block in the compute precision; h hidden width, f MLP width, r rank, as many
key/value heads as query heads, all heads together as wide as h:

=================================  =====================  =====================
saved by a block                   factors                one stacked GEMM
=================================  =====================  =====================
its input, both norms' outputs,
the input of the second norm       4 h                    4 h
rotated q and k, v, output         4 h                    6 h: v is a part of
                                                          the stack q, k, v
the same, custom attention kernel  4 h                    4 h: q, k, v stay
                                                          in the stack
norms of q and k also keep them    2 h                    0: they are in the
as projected                                              stack; 2 h with the
                                                          custom kernel
bottlenecks                        7 r                    0
the same in CoLA, whose
nonlinearity keeps its input       14 r
gate, up and their product         3 f                    3 f
silu too without torch.compile     f                      f
gate and up only, SwiGLU inside
the operator of ``down``           2 f                    2 f
=================================  =====================  =====================

With norms after attention and MLP the 4 h are the inputs of q, k, v, of both norms and of the MLP.
A layer without rotation keeps no rotated q and k beside the stack.

These are the tensors that torch's autograd saves for a block; tests/estimate/test_activations.py
counts them in real blocks. A formula, because the estimate is made where no GPU, Triton or compiled
block is at hand, in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalr.config.schema import RunConfig
from megalr.estimate.tensors import DENSE_INSIDE, MatrixGroup, matrix_groups
from megalr.kernels.attention import HEAD_WIDTHS, MAX_LENGTH
from megalr.layers.head import chunk_length
from megalr.models.build import dlr_alpha_of
from megalr.models.config import DecoderConfig
from megalr.models.recompute import SELECTIVE
from megalr.tensor_parallel.plan import Plan

LIBRARIES = 80 * 2**20
"""Bytes of library workspaces inside the allocator: the part of recorded peaks that no tensor
explains."""

TWO_PRODUCTS = ("low_rank", "loro", "cola")
"""Methods whose factorized layers are layers.linear.BottleneckLinear."""


@dataclass(frozen=True)
class Kernels:
    """Which custom kernels a run uses.

    Attributes:
        attention: kernels.attention, which saves q, k, v as projected.
        swiglu: kernels.swiglu, which saves gate and up but not their product.
        loss: kernels.loss, which materializes no float32 logits.
        flex: FlexAttention, for document masks where the attention kernel does not apply.
    """

    attention: bool = False
    swiglu: bool = False
    loss: bool = False
    flex: bool = False


@dataclass(frozen=True)
class Shape:
    """How a micro-batch is computed.

    Attributes:
        tokens: micro-batch size times sequence length.
        element: bytes of a number of the compute precision.
        compiled: ``train.compile``.
        recompute: ``train.activation_checkpointing``, one of models.recompute.LEVELS.
        kernels: which custom kernels ``train.kernels`` selects.
        masked: tokens of a sequence with document masks; 0 without masks.
    """

    tokens: int
    element: int
    compiled: bool
    recompute: str
    kernels: Kernels = Kernels()
    masked: int = 0


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one micro-batch.

    Attributes:
        kept: saved by all blocks for backward.
        work: temporary memory, the larger of the head's and of a block's backward pass.
        again: recomputed by one block in backward, a part of ``work``.
    """

    kept: int
    work: int
    again: int = 0


def kernels_of(config: RunConfig, sizes: DecoderConfig, plan: Plan, hopper: bool) -> Kernels:
    """The custom kernels that ``train.kernels`` selects on CUDA GPUs with Triton.

    Args:
        config: of the run.
        sizes: its model, padded.
        plan: tensor parallelism.
        hopper: whether the GPUs are those that the attention kernels are written for (H100, H200).
    """
    if config.train.kernels == "torch":
        return Kernels()
    half = config.train.precision != "fp32"
    length, window = config.data.sequence_length, sizes.sliding_window
    fits = length <= MAX_LENGTH and sizes.head_width in HEAD_WIDTHS
    fits = fits and sizes.rotary_width == sizes.head_width
    masks = config.data.document_mask
    fits = fits and (masks or window is None or window >= length)  # masks include the window
    attention = half and hopper and fits
    down = matrix_groups(sizes, config.method, plan)[3]
    reads_gated = not down.factorized or config.method.name in TWO_PRODUCTS
    return Kernels(
        attention=attention,
        swiglu=half and reads_gated and _gated_silu(sizes),
        loss=not plan.parallel,
        flex=masks and half and not attention and _flex_fits(config, sizes),
    )


def _flex_fits(config: RunConfig, sizes: DecoderConfig) -> bool:
    width, train = sizes.head_width, config.train
    compiles = train.compile or train.activation_checkpointing not in SELECTIVE
    return compiles and width >= 16 and width & (width - 1) == 0


def _gated_silu(sizes: DecoderConfig) -> bool:
    return sizes.gated_mlp and sizes.activation == "silu"


def activation_bytes(
    sizes: DecoderConfig, method: Any, plan: Plan, shape: Shape
) -> ActivationBytes:
    """Activations of a micro-batch on one rank."""
    layers = [matrix_groups(sizes, method, plan, layer) for layer in range(sizes.num_layers)]
    groups = layers[0]
    heads = sizes.num_heads // plan.mesh.tensor_size
    residual = sizes.hidden_size // (plan.mesh.tensor_size if plan.sharded_residual else 1)

    def block(layer: int) -> float:
        rotates = sizes.rotates(layer)
        token = block_elements(sizes, method, plan, layers[layer], shape, rotates)
        # Besides the elements: log-sum-exp of attention and the norms' scales, float32.
        return shape.tokens * (token * shape.element + 4 * (heads + 2 + _head_scales(sizes, plan)))

    once, each = mask_bytes(sizes, shape)
    whole = [block(layer) for layer in range(sizes.num_layers)]
    saved = sum(whole) + shape.tokens * sizes.num_layers * each
    again = 0.0
    if shape.recompute != "none":
        kept = [kept_elements(sizes, method, plan, found, shape) for found in layers]
        kept = [shape.tokens * shape.element * count for count in kept]
        if shape.recompute in ("elementwise", "mlp"):
            kept = [size + shape.tokens * 4 * heads for size in kept]
        saved = sum(kept)
        # Recomputed by a block in backward; the rest has been saved.
        most = max(size - left for size, left in zip(whole, kept, strict=True))
        again = max(0.0, most) + shape.tokens * each
    mlp = (3 * groups[2].local_rows[0] + 2 * residual) * shape.element
    backward = shape.tokens * max(mlp, attention_backward_bytes(sizes, plan, shape)) + again
    backward += shape.element * max(_weight_transient(method, found) for found in layers)
    head = head_bytes(sizes, plan, shape)
    work = int(max(backward, head)) + LIBRARIES
    return ActivationBytes(int(saved + shape.tokens * once), work, int(again))


def attention_backward_bytes(sizes: DecoderConfig, plan: Plan, shape: Shape) -> float:
    """Bytes per token while attention's backward pass works, besides what is kept.

    Gradients of the residual stream and the attention norm's input, of o, q, k, v; torch's
    backends (FlashAttention-2, cuDNN) also sum dq in float32, with the products dO O of each head,
    and with fewer key heads write dk and dv of every query head first. The custom kernel's scratch
    does not grow with the tokens.
    """
    t = plan.mesh.tensor_size
    q, kv, heads = sizes.q_width / t, sizes.kv_width / t, sizes.num_heads / t
    residual = sizes.hidden_size / (t if plan.sharded_residual else 1)
    numbers = 2 * residual + 2 * q + 2 * kv
    if shape.kernels.attention:
        return numbers * shape.element
    numbers += 2 * q if kv < q else 0
    return numbers * shape.element + 4 * (q + heads)


def mask_bytes(sizes: DecoderConfig, shape: Shape) -> tuple[float, float]:
    """Bytes per token that document masks keep, in all and in each block.

    Bounds, three int32; tables of each row's positions, float32, but for the attention kernel,
    which reads the common ones; without a kernel S bool, of which sdpa makes a copy in the compute
    precision in each block.
    """
    if not shape.masked:
        return 0, 0
    rope = sizes.positions == "rope" and not shape.kernels.attention
    once = 3 * 4 + (2 * 4 * sizes.rotary_width if rope else 0)
    if shape.kernels.attention or shape.kernels.flex:
        return once, 0
    return once + shape.masked, shape.masked * shape.element


def _head_scales(sizes: DecoderConfig, plan: Plan) -> int:
    """Numbers per token that the norms of q and k divide by, on one rank."""
    heads = (sizes.num_heads + sizes.kv_heads) // plan.mesh.tensor_size
    return {"none": 0, "head": heads, "full": 2}[sizes.qk_norm]


def block_elements(
    sizes: DecoderConfig,
    method: Any,
    plan: Plan,
    groups: list[MatrixGroup],
    shape: Shape,
    rotates: bool = True,
) -> float:
    """Elements per token that a block saves, as in the table above.

    ``rotates``: whether q and k of this block are rotated.
    """
    t = plan.mesh.tensor_size
    q, kv = sizes.q_width / t, sizes.kv_width / t
    f = groups[2].local_rows[0]
    residual = sizes.hidden_size / (t if plan.sharded_residual else 1)
    count = 4 * residual + 2 * q + 2 * kv
    stacked = not groups[0].factorized or method.name == "sltrain"
    if sizes.qk_norm != "none":
        count += q + kv
    elif stacked and rotates and not shape.kernels.attention:
        # v keeps the stack alive that one GEMM gives, beside the rotated q and k.
        ranks = groups[0].ranks or (0, 0, 0)
        count += sum(m for m, rank in zip((q, kv), ranks, strict=False) if rank == ranks[2])
    if shape.kernels.swiglu:
        count += 2 * f
    elif sizes.gated_mlp:
        count += (3 if shape.compiled else 4) * f  # not compiled, silu(gate) is saved as well
    else:
        count += 2 * f
    if method.name != "sltrain":
        both = method.name == "cola"  # before and after the nonlinearity
        count += _bottleneck_elements(groups) * (2 if both else 1)
    if shape.compiled:
        # Norms whose ranks sum the squares keep their input in float32, beside a stack if there is.
        summed = plan.parallel and sizes.qk_norm == "full"
        count += (2 if stacked else 1) * (q + kv) if summed else 0
        count += 2 * residual if plan.sharded_residual and sizes.norm_order == "post" else 0
    if plan.sharded_residual and sizes.norm_order == "pre":
        # Not compiled, the residual stream in float32 as well, for its squares.
        count += 0 if shape.compiled else 4 * residual
    return count


def kept_elements(
    sizes: DecoderConfig, method: Any, plan: Plan, groups: list[MatrixGroup], shape: Shape
) -> float:
    """Elements per token that a block saves under recomputation (models.recompute)."""
    t = plan.mesh.tensor_size
    residual = sizes.hidden_size / (t if plan.sharded_residual else 1)
    # q, k, v and the output of attention
    attention = 2 * (sizes.q_width + sizes.kv_width) / t
    between = 0 if method.name == "sltrain" else _bottleneck_elements(groups)
    if shape.recompute == "full":
        return residual
    if shape.recompute == "bottleneck":
        return residual + between
    if shape.recompute == "mlp":
        return residual + attention + between
    projections = (2 if sizes.gated_mlp else 1) * groups[2].local_rows[0]
    # The input of a norm after the MLP, the product with down, is kept too.
    count = (3 if sizes.norm_order == "post" else 2) * residual + attention + projections + between
    if method.name in DENSE_INSIDE:
        # Both products are saved: with the frozen matrix and with the factors.
        count += sum(sum(group.local_rows) for group in groups[:3] if group.factorized)
    return count


def _bottleneck_elements(groups: list[MatrixGroup]) -> int:
    """Elements per token between the factors of a block: 7 r if all ranks are r."""
    return sum(sum(group.ranks) for group in groups)


def _weight_transient(method: Any, groups: list[MatrixGroup]) -> int:
    """Elements that backward forms beside the weights, one group at a time: SLTrain's W, then its
    gradient; DLR's B + E."""
    if dlr_alpha_of(method) is not None:
        return max(
            rank * sum(group.local_rows[index] for index in members)
            for group in groups
            for rank, members in group.by_rank()
        )
    if method.name != "sltrain":
        return 0
    return max(
        sum(group.local_rows[index] for index in members) * group.local_n
        for group in groups
        for _, members in group.by_rank()
    )


def head_bytes(sizes: DecoderConfig, plan: Plan, shape: Shape) -> float:
    """Bytes while the head works: a chunk of logits, its loss, gradients of input and weight."""
    rows, h = sizes.padded_vocab_size // plan.mesh.tensor_size, sizes.hidden_size
    chunk = chunk_length(shape.tokens, rows, shape.element)
    chunks, logits = -(-shape.tokens // chunk), chunk * rows
    # The weight's gradient: this chunk's product and the sum over earlier chunks, which is float32
    # from the second chunk on.
    before = {1: 0, 2: shape.element}.get(chunks, 4)
    weight = rows * h * (before + shape.element)
    # The PyTorch reference holds four float32 arrays of the chunk's size at a time.
    one_array = shape.compiled or shape.kernels.loss
    arrays = logits * (shape.element if one_array else shape.element + 16)
    # With two chunks their sum is formed after the logits are freed.
    adding = rows * h * (4 + 2 * shape.element) if chunks > 1 else 0
    return max(arrays + weight, adding) + 3 * shape.tokens * h * shape.element
