"""Attention of a block: its projections, rotary positions, and the choice of its kernel.

Shapes: B batch, S sequence, h hidden, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megalr.kernels.attention import attention, attention_applies, attention_reference
from megalr.kernels.document_mask import AttentionMask
from megalr.layers.deferred import DeferredRMSNorm, values_of
from megalr.layers.factors import LinearShape
from megalr.layers.linear import BottleneckLinear, GroupedLinear
from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.plan import Plan

MakeLinear = Callable[[LinearShape, bool], GroupedLinear]
"""Builds the linear layer of one group of matrices, ``(shape, bias)``; the method decides which."""


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """``(2, S, D)`` float32: cosines and sines of ``position / theta^(2i/D)``, half-split.

    RoFormer, arXiv 2104.09864 §3.2; element i is paired with element i + D/2.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), theta**-exponent)
    angles = torch.cat((angles, angles), dim=-1)  # (S, D)
    return torch.stack((angles.cos(), angles.sin()))


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
        h, kv = config.hidden_size, config.kv_heads * config.head_dim
        self.config = config
        self.fused = False
        qkv = LinearShape(
            tuple(f"{prefix}.{name}" for name in "qkv"),
            h,
            (h, kv, kv),
            h,
            (h, kv, kv),
            plan.column_parallel(),
        )
        self.qkv = make_linear(qkv, config.attention_bias)
        o = LinearShape((f"{prefix}.o",), h, (h,), h, (h,), plan.row_parallel())
        self.o = make_linear(o, config.output_bias)

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
        return self.fused and attention_applies(x, mask, self.config.head_dim)

    def core(
        self,
        x: torch.Tensor | DeferredRMSNorm,
        rope: torch.Tensor | None,
        mask: AttentionMask,
    ) -> torch.Tensor:
        """``softmax(q k^T / sqrt(D)) v``, heads side by side: the input of ``o``, ``(B, S, H D)``.

        Under tensor parallelism H are this rank's heads.

        Args:
            x: ``(B, S, h)``, normalized.
            rope: tables of :func:`rope_tables`, or of each row, ``(2, B, 1, S, D)``; None for no
                rotation.
            mask: ``(S, S)`` or ``(B, 1, S, S)``, True where a position may look; other forms of
                kernels.document_mask; None for causal attention.
        """
        if self.uses_kernel(values_of(x), mask):
            # The operator takes the stack of a bottleneck layer, (3, B, S, H D), but not the one
            # of a dense layer, (B, S, 3 H D).
            stacked = isinstance(self.qkv, BottleneckLinear)
            projections = self.qkv.forward_stacked(x) if stacked else self.qkv(x)
            return attention(projections, rope, self.config.head_dim)
        q, k, v = self.qkv(x)
        return attention_reference(q, k, v, rope, mask, self.config.head_dim)
