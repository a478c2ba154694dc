"""Attention of a block: its projections, norms of queries and keys, the choice of its kernel.

Shapes: B batch, S sequence, h hidden, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megalr.kernels.attention import attention, attention_applies, attention_reference
from megalr.kernels.document_mask import AttentionMask, is_bounds
from megalr.layers.deferred import DeferredRMSNorm, values_of
from megalr.layers.factors import LinearShape
from megalr.layers.linear import BottleneckLinear, GroupedLinear
from megalr.layers.norm import HeadRMSNorm, SummedRMSNorm, rms_norm_of_shards
from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.plan import Plan

MakeLinear = Callable[[LinearShape, bool], GroupedLinear]
"""Builds the linear layer of one group of matrices, ``(shape, bias)``; the method decides which."""


def make_head_norm(
    config: DecoderConfig, width: int, plan: Plan
) -> HeadRMSNorm | SummedRMSNorm | nn.RMSNorm | None:
    """The norm of queries or keys, ``width`` over all heads of all ranks; None if there is none."""
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "head":
        return HeadRMSNorm(config.head_width, config.norm_eps, plan.group)
    return rms_norm_of_shards(width, config.norm_eps, plan.mesh)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245).

    Args:
        config: sizes and choices.
        prefix: logical name of this layer, ``layers.3.attention``.
        make_linear: builds the linear layers.
        plan: how the weights are sharded.

    Attributes:
        fused: whether :meth:`core` uses the kernel of kernels.attention where it applies.
    """

    def __init__(
        self, config: DecoderConfig, prefix: str, make_linear: MakeLinear, plan: Plan
    ) -> None:
        super().__init__()
        h, q, kv = config.hidden_size, config.q_width, config.kv_width
        self.config = config
        self.fused = False
        qkv = LinearShape(
            tuple(f"{prefix}.{name}" for name in "qkv"),
            h,
            (q, kv, kv),
            h,
            (q, kv, kv),
            plan.column_parallel(),
        )
        self.qkv = make_linear(qkv, config.attention_bias)
        o = LinearShape((f"{prefix}.o",), q, (h,), q, (h,), plan.row_parallel())
        self.o = make_linear(o, config.output_bias)
        self.q_norm = make_head_norm(config, config.q_width, plan)
        self.k_norm = make_head_norm(config, config.kv_width, plan)
        # The kernel rotates whole heads.
        self.kernel_rotates = config.rotary_width == config.head_width

    def forward(
        self,
        x: torch.Tensor | DeferredRMSNorm,
        rope: torch.Tensor | None,
        mask: AttentionMask,
    ) -> torch.Tensor:
        """``o(core(x))``: ``(B, S, h)`` to ``(B, S, h)``, or a shard of it along h."""
        (y,) = self.o(self.core(x, rope, mask))
        return y

    def uses_kernel(self, x: torch.Tensor, mask: AttentionMask) -> bool:
        """Whether :meth:`core` of ``x (B, S, ...)`` uses the kernel of kernels.attention."""
        fits = self.fused and self.kernel_rotates
        return fits and attention_applies(x, mask, self.config.head_width)

    def core(
        self,
        x: torch.Tensor | DeferredRMSNorm,
        rope: torch.Tensor | None,
        mask: AttentionMask,
    ) -> torch.Tensor:
        """``softmax(q k^T / sqrt(D)) v``, heads side by side: the input of ``o``, ``(B, S, H D)``.

        q and k are normalized (``qk_norm``) and rotated before. Under tensor parallelism H are this
        rank's heads.

        Args:
            x: ``(B, S, h)``, normalized.
            rope: tables of models.rope, or of each row, ``(2, B, 1, S, W)``; None for no rotation.
            mask: ``(S, S)`` or ``(B, 1, S, S)``, True where a position may look; other forms of
                kernels.document_mask; None for causal attention.
        """
        width = self.config.head_width
        fused = self.uses_kernel(values_of(x), mask)
        documents = mask if is_bounds(mask) else None
        if fused and self.q_norm is None and isinstance(self.qkv, BottleneckLinear):
            # The operator takes the stack of a bottleneck layer, (3, B, S, H D), but not the one
            # of a dense layer, (B, S, 3 H D).
            return attention(self.qkv.forward_stacked(x), rope, width, documents)
        q, k, v = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if fused:
            return attention((q, k, v), rope, width, documents)
        return attention_reference(q, k, v, rope, mask, width)
