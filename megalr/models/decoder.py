"""The decoder: token ids to logits or the summed loss. It knows no engine and no training options;
a tensor-parallel plan says which shard of the weights a rank holds.

* RMSNorm (arXiv 1910.07467) or LayerNorm before attention and MLP, or after them; a final norm
  before the head
* RoPE (models.rope) in all layers or some, or learned positions
* causal grouped-query attention (arXiv 2305.13245), optional sliding window in all layers or some,
  within documents where their positions are given (kernels.document_mask); optional norms of
  queries and keys (models.attention)
* SwiGLU (arXiv 2002.05202) or an MLP without a gate
* q, k, v are one group of matrices, gate and up another (layers.factors)
* MLP width and vocabulary are padded. Padded rows and columns are zero, get no gradient, and so
  stay zero: the activation of a padded unit is act(0) * 0 = 0

Shapes: B batch, S sequence, h hidden, H heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from megalr.errors import UserError
from megalr.kernels import half_on_gpu
from megalr.kernels.document_mask import (
    AttentionMask,
    block_mask,
    document_bounds,
    flex_applies,
    is_bounds,
    visible,
)
from megalr.kernels.norm import add_norm, add_norm_applies
from megalr.layers.deferred import DeferredRMSNorm, DeferredSwiGLU, values_of
from megalr.layers.embedding import Embedding
from megalr.layers.factors import FactorPair, LinearShape
from megalr.layers.head import Head
from megalr.layers.linear import (
    BottleneckLinear,
    DenseLinear,
    FactorizedLinear,
    GroupedLinear,
)
from megalr.layers.mixed_ranks import MixedRankLinear
from megalr.layers.norm import FinalNorm, ShardedRMSNorm, SummedRMSNorm
from megalr.models.attention import Attention, MakeLinear
from megalr.models.config import DecoderConfig
from megalr.models.recompute import recomputed
from megalr.models.rope import rope_tables
from megalr.tensor_parallel.plan import SINGLE, Plan

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


Norm = nn.RMSNorm | nn.LayerNorm | ShardedRMSNorm | SummedRMSNorm


def make_norm(config: DecoderConfig, plan: Plan) -> Norm:
    """The norm of a block; statistics are computed in float32."""
    h, eps = config.hidden_size, config.norm_eps
    if plan.sharded_residual:
        # What follows a norm after attention or MLP is no matrix, so its factor cannot be deferred.
        kind = SummedRMSNorm if config.norm_order == "post" else ShardedRMSNorm
        return kind(h, eps, plan.mesh)
    return nn.RMSNorm(h, eps=eps) if config.norm == "rmsnorm" else nn.LayerNorm(h, eps=eps)


class MLP(nn.Module):
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate (arXiv 2002.05202).

    Args:
        config: sizes and choices.
        prefix: logical name of this layer, ``layers.3.mlp``.
        make_linear: builds the linear layers.
        plan: how the weights are sharded.

    Attributes:
        fused: whether ``down`` computes ``act(gate x) * up x`` in its own operator.
    """

    def __init__(
        self, config: DecoderConfig, prefix: str, make_linear: MakeLinear, plan: Plan
    ) -> None:
        super().__init__()
        h, used = config.hidden_size, config.intermediate_size
        padded = config.padded_intermediate_size
        names = ("gate", "up") if config.gated_mlp else ("up",)
        gate_up = LinearShape(
            tuple(f"{prefix}.{name}" for name in names),
            h,
            (padded,) * len(names),
            h,
            (used,) * len(names),
            plan.column_parallel(),
        )
        self.into = make_linear(gate_up, config.output_bias)  # the name in checkpoints
        down = LinearShape((f"{prefix}.down",), padded, (h,), used, (h,), plan.row_parallel())
        self.down = make_linear(down, config.output_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated_mlp
        self.fused = False

    def forward(self, x: torch.Tensor | DeferredRMSNorm) -> torch.Tensor:
        """``(B, S, h)`` to ``(B, S, h)``, or a shard of it along h."""
        if self.fused and half_on_gpu(values_of(x)):
            (y,) = self.down(DeferredSwiGLU(self.gate_up.forward_stacked(x)))
        else:
            (y,) = self.down(self.activate(self.gate_up(x)))
        return y

    def fuse(self) -> None:
        """Let ``down`` apply SwiGLU by the custom kernel, if the layer and activation allow it."""
        supported = isinstance(self.down, BottleneckLinear | DenseLinear)
        self.fused = supported and self.gated and self.activation is F.silu

    @property
    def gate_up(self) -> GroupedLinear:
        """The layer of gate and up, or of up alone without a gate."""
        return self.into

    def activate(self, projections: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """``act(gate) * up``, or ``act(up)``: the input of ``down``, ``(B, S, padded width)``."""
        hidden = self.activation(projections[0])
        return hidden * projections[1] if self.gated else hidden


class Block(nn.Module):
    """``x + attention(norm x)``, then ``x + mlp(norm x)``; the last sum is left to the next block.

    With ``norm_order`` post: ``x + norm attention(x)``, then ``x + norm mlp(x)``.

    A compiled block cannot fuse its last sum with a norm in another block; the next block, which
    receives both terms, can.

    Args:
        config: sizes and choices.
        index: number of the block, from 0.
        make_linear: builds the linear layers.
        plan: how the weights are sharded.
        recompute: level of activation checkpointing, one of models.recompute.LEVELS.

    Attributes:
        fused: whether sums and their norms use the kernel of kernels.norm where it applies.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        make_linear: MakeLinear,
        plan: Plan,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.post_norm = config.norm_order == "post"
        self.fused = False
        self.attention_norm = make_norm(config, plan)
        self.attention = Attention(config, f"layers.{index}.attention", make_linear, plan)
        self.mlp_norm = make_norm(config, plan)
        self.mlp = MLP(config, f"layers.{index}.mlp", make_linear, plan)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None,
        mask: AttentionMask,
        added: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two terms whose sum is the output, for the input ``x + added``; all are ``(B, S, h)``.

        ``rope`` and ``mask`` as in :meth:`Attention.core`.
        """
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._compute(x, added, rope, mask)
        if added is not None:
            x = x + added  # so that one tensor is kept, not two
        qkv_sizes = self.attention.qkv.sizes
        terms: tuple[torch.Tensor, torch.Tensor] = recomputed(
            self._compute, x, None, rope, mask, level=self.recompute, qkv_sizes=qkv_sizes
        )
        return terms

    def _compute(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None,
        rope: torch.Tensor | None,
        mask: AttentionMask,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.post_norm:
            x = x if added is None else x + added
            x = x + self.attention_norm(self.attention(x, rope, mask))
            return x, self.mlp_norm(self.mlp(x))
        x, normed = self._add_and_norm(self.attention_norm, x, added)
        x, normed = self._add_and_norm(self.mlp_norm, x, self.attention(normed, rope, mask))
        return x, self.mlp(normed)

    def _add_and_norm(
        self, norm: nn.Module, x: torch.Tensor, added: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | DeferredRMSNorm]:
        """``x + added`` and its norm."""
        if added is None:
            return x, norm(x)
        if self.fused and isinstance(norm, nn.RMSNorm) and norm.eps and add_norm_applies(x):
            return add_norm(x, added, norm.weight, norm.eps)
        x = x + added
        return x, norm(x)


class Decoder(nn.Module):
    """Token ids to logits, or to the summed loss.

    Args:
        config: sizes and choices.
        make_linear: builds the linear layer of a group of matrices, and thereby chooses the method.
        recompute: level of activation checkpointing, one of models.recompute.LEVELS.
        plan: which shard of the weights this rank holds; the default is all of them.
        made: called with each piece (models.drawing) as soon as it is built.
    """

    def __init__(
        self,
        config: DecoderConfig,
        make_linear: MakeLinear,
        recompute: str = "none",
        plan: Plan = SINGLE,
        made: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        made = made or (lambda piece: None)

        def block(index: int) -> Block:
            built = Block(config, index, make_linear, plan, recompute)
            made(built)
            return built

        self.config = config
        self.plan = plan
        self.flex = False
        self.embedding = Embedding(
            config.vocab_size, config.padded_vocab_size, config.hidden_size, plan.mesh
        )
        made(self.embedding)
        self.positions = (
            nn.Embedding(config.position_rows, config.hidden_size) if config.position_rows else None
        )
        if self.positions is not None:
            made(self.positions)
        self.layers = nn.ModuleList(map(block, range(config.num_layers)))
        self.norm = FinalNorm(config.norm, config.hidden_size, config.norm_eps, plan.group)
        self.head = Head(
            config.vocab_size,
            config.padded_vocab_size,
            config.hidden_size,
            self.embedding.weight if config.tie_embeddings else None,
            plan.mesh,
        )
        made(self.head)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``(B, S, V)`` of ``input_ids (B, S)``, or the loss if ``labels (B, S)`` are given.

        ``labels[b, t]`` is the target of position t (already shifted), -100 where there is none.
        The loss is a float32 scalar: the sum of -log p(label) over all targets. ``positions (B,
        S)`` int32: place of each token in its document, below S, for rows of several documents,
        each of which is computed as if it were alone; None: a row is one document.
        """
        if labels is None:
            return self.head(self.hidden_states(input_ids, positions))
        return self.summed_loss(input_ids, labels, positions)

    def summed_loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of -log p(label) over all targets, float32 scalar."""
        return self.head(self.hidden_states(input_ids, positions), labels)

    def hidden_states(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B, S, h)``, normalized: the input of the head."""
        S = input_ids.shape[1]
        # (B, S, h); in layout bottleneck (B, S, h/p) from here to the final norm
        x = self.plan.start_residual(self.embedding(input_ids))
        windows = [self._window(layer, S) for layer in range(len(self.layers))]
        masks = {window: self._mask(x, positions, window) for window in set(windows)}
        rope = self._rope(S, positions, masks[windows[0]], x.device)
        if self.positions is not None:
            self._check_length(S)
            places = torch.arange(S, device=x.device) if positions is None else positions
            x = x + self.positions(places)
        added = torch.zeros_like(x)  # with None the first block would compile to another graph
        for index, block in enumerate(self.blocks()):
            rotation = rope if self.config.rotates(index) else None
            x, added = block(x, rotation, masks[windows[index]], added)
        return self.norm(self.plan.end_residual(x + added))

    def _window(self, layer: int, S: int) -> int | None:
        """The layer's sliding window; None if it covers the whole sequence."""
        window = self.config.window(layer)
        return None if window is None or window >= S else window

    def _rope(
        self, S: int, positions: torch.Tensor | None, mask: AttentionMask, device: torch.device
    ) -> torch.Tensor | None:
        """Tables ``(2, S, W)``, or of each row where the kernel does not read ``positions``."""
        config = self.config
        if config.positions != "rope":
            return None
        width, theta = config.rotary_width, config.rope_theta
        rope = rope_tables(S, width, theta, device, config.rope_scaling)
        if positions is None or is_bounds(mask):
            return rope
        return rope[:, positions.long()].unsqueeze(2)  # (2, B, 1, S, W)

    def _check_length(self, S: int) -> None:
        if self.config.position_rows < S:
            raise UserError(
                f"a sequence of {S} tokens is longer than the model's {self.config.position_rows} "
                "learned positions: lower data.sequence_length"
            )

    def _mask(
        self, x: torch.Tensor, positions: torch.Tensor | None, window: int | None
    ) -> AttentionMask:
        """What each position of ``x (B, S, ...)`` sees, in the form of the fastest kernel.

        All layers of one batch have the same form, whatever their windows, if there are positions.
        """
        if positions is not None:
            bounds = document_bounds(positions, window)
            if self.blocks()[0].attention.uses_kernel(x, bounds):
                return bounds
            if self.flex and flex_applies(x, self.config.head_width):
                return block_mask(bounds)
            return visible(bounds)
        if window is None:
            return None
        place = torch.arange(x.shape[1], device=x.device)
        distance = place[:, None] - place[None, :]
        return (distance >= 0) & (distance < window)

    def use_kernels(self, flex: bool = True) -> None:
        """Use the custom kernels wherever one takes the device, dtype and shape.

        ``flex``: FlexAttention for document masks. Blocks that are not compiled cannot use it under
        selective recomputation, which disables the compilation that it needs.
        """
        self.flex = flex
        self.head.fuse_loss()
        self.embedding.fused = True
        for block in self.blocks():
            block.attention.fused = True
            block.fused = True
            block.mlp.fuse()

    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.layers if isinstance(block, Block)]

    def groups(self) -> Iterator[GroupedLinear]:
        """The layers of the blocks, one for the matrices of each input, in order."""
        for block in self.blocks():
            yield from (block.attention.qkv, block.attention.o, block.mlp.gate_up, block.mlp.down)

    def linears(self) -> Iterator[GroupedLinear]:
        """The layers that store the matrices, in order: of groups that differ in rank the parts."""
        layers = (module for module in self.modules() if isinstance(module, GroupedLinear))
        return (layer for layer in layers if not isinstance(layer, MixedRankLinear))

    def factor_pairs(self) -> list[FactorPair]:
        """All factorized matrices, in order; empty for a dense model."""
        return [pair for linear in self.linears() for pair in linear.factor_pairs()]

    def factor_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold factors, CoLA's included, whose product is not a matrix."""
        factorized = (linear for linear in self.linears() if isinstance(linear, FactorizedLinear))
        return [parameter for linear in factorized for parameter in (linear.a, linear.b)]
