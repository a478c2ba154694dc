"""The decoder. Pure: no engine, no options of training; a Plan says what a rank holds of it.

* RMSNorm or LayerNorm before attention and MLP; a last norm before the head
* RoPE in the half-split layout, or learned positions
* grouped-query attention, causal, optional sliding window (see kernels.attention)
* SwiGLU or a plain MLP
* q, k, v are one group of matrices, gate and up another (see layers.factors)
* MLP width and vocabulary are padded; padded rows and columns are zero, get no gradient, and so
  stay zero: the activation of a padded unit is act(0) * 0 = 0

Shapes: B batch, S sequence, h hidden, H heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from megalr.kernels import half_on_gpu
from megalr.kernels.attention import applies, attention, plain_attention
from megalr.kernels.norm import add_norm, add_norm_applies
from megalr.layers.embedding import Embedding, init_rows
from megalr.layers.factors import FactorPair, LinearShape
from megalr.layers.gated import DeferredSwiGLU
from megalr.layers.head import Head
from megalr.layers.linear import (
    BottleneckLinear,
    DenseLinear,
    FactorizedLinear,
    GroupedLinear,
)
from megalr.layers.norm import DeferredRMSNorm, FinalNorm, ShardedRMSNorm
from megalr.models.config import DecoderConfig
from megalr.models.recompute import recomputed
from megalr.tensor_parallel.plan import SINGLE, Plan

MakeLinear = Callable[[LinearShape, bool], GroupedLinear]
"""Builds the layer of one group of matrices; the method decides which kind."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def make_norm(config: DecoderConfig, plan: Plan) -> nn.RMSNorm | nn.LayerNorm | ShardedRMSNorm:
    """The norm of the family for a block; statistics are computed in float32."""
    if plan.sharded_residual:
        return ShardedRMSNorm(config.hidden_size, config.norm_eps, plan.mesh)
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """``(2, S, D)`` float32: cosines and sines of ``position / theta^(2i/D)``, half-split."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), theta**-exponent)
    angles = torch.cat((angles, angles), dim=-1)  # (S, D)
    return torch.stack((angles.cos(), angles.sin()))


def _values(x: torch.Tensor | DeferredRMSNorm) -> torch.Tensor:
    """A tensor with device, dtype and shape of what a layer reads."""
    return x if isinstance(x, torch.Tensor) else x.values


class Attention(nn.Module):
    """Causal grouped-query attention.

    ``fused`` may be set: use the kernel of kernels.attention where it applies, not plain torch.
    """

    def __init__(
        self, config: DecoderConfig, prefix: str, make_linear: MakeLinear, plan: Plan
    ) -> None:
        super().__init__()
        h, kv = config.hidden_size, config.kv_heads * config.head_dim
        self.config = config
        self.fused = False  # whether core may use the custom kernel
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
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        (y,) = self.o(self.core(x, rope, mask))
        return y

    def core(
        self,
        x: torch.Tensor | DeferredRMSNorm,
        rope: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """``softmax(q k^T) v``, heads side by side: what ``o`` reads.

        Under tensor parallelism q, k, v are those of this rank's heads.
        """
        if self.fused and applies(_values(x), mask, self.config.head_dim):
            # One tensor side by side, of a dense layer, is not what the operator takes.
            together = isinstance(self.qkv, BottleneckLinear)
            projections = self.qkv.forward_stacked(x) if together else self.qkv(x)
            return attention(projections, rope, self.config.head_dim)
        q, k, v = self.qkv(x)
        return plain_attention(q, k, v, rope, mask, self.config.head_dim)


class MLP(nn.Module):
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate."""

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
        self.into = make_linear(gate_up, config.output_bias)  # its name in checkpoints
        down = LinearShape((f"{prefix}.down",), padded, (h,), used, (h,), plan.row_parallel())
        self.down = make_linear(down, config.output_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated_mlp
        self.fused = False  # whether down may form its input itself

    def forward(self, x: torch.Tensor | DeferredRMSNorm) -> torch.Tensor:
        if self.fused and half_on_gpu(_values(x)):
            (y,) = self.down(DeferredSwiGLU(self.gate_up.forward_stacked(x)))
        else:
            (y,) = self.down(self.activate(self.gate_up(x)))
        return y

    def fuse(self) -> None:
        """Let ``down`` form its input itself, by the kernel of our own, where that is possible."""
        kind = isinstance(self.down, BottleneckLinear | DenseLinear)
        self.fused = kind and self.gated and self.activation is F.silu

    @property
    def gate_up(self) -> GroupedLinear:
        """The layer of gate and up, or of up alone without a gate."""
        return self.into

    def activate(self, projections: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """``act(gate) * up``, or ``act(up)``: what ``down`` reads, ``(B, S, padded width)``."""
        hidden = self.activation(projections[0])
        return hidden * projections[1] if self.gated else hidden


class Block(nn.Module):
    """``x + attention(norm x)``, then ``x + mlp(norm x)``, the last sum left to who comes next.

    A compiled block cannot put its last sum into the kernel of a norm that is in another block; the
    next block, which is given both terms, can.

    ``recompute``: what the backward pass computes again (models.recompute). ``fused`` may be set:
    sums and their norms by the kernels of kernels.norm where they apply.
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
        self.fused = False
        self.attention_norm = make_norm(config, plan)
        self.attention = Attention(config, f"layers.{index}.attention", make_linear, plan)
        self.mlp_norm = make_norm(config, plan)
        self.mlp = MLP(config, f"layers.{index}.mlp", make_linear, plan)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None,
        mask: torch.Tensor | None,
        added: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two terms whose sum is the output, for the input ``x + added (B, S, h)``."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(x, added, rope, mask)
        if added is not None:
            x = x + added  # what is kept is one tensor
        sizes = self.attention.qkv.sizes
        terms: tuple[torch.Tensor, torch.Tensor] = recomputed(
            self._whole, x, None, rope, mask, level=self.recompute, read_by_attention=sizes
        )
        return terms

    def _whole(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None,
        rope: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, normed = self._normed(self.attention_norm, x, added)
        x, normed = self._normed(self.mlp_norm, x, self.attention(normed, rope, mask))
        return x, self.mlp(normed)

    def _normed(
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
        make_linear: builds the linear layer of a group of matrices, so decides the method.
        recompute: what the backward pass computes again instead of keeping it: one of
            models.recompute.LEVELS.
        plan: which parts of the weights this rank holds; the default is all.
    """

    def __init__(
        self,
        config: DecoderConfig,
        make_linear: MakeLinear,
        recompute: str = "none",
        plan: Plan = SINGLE,
    ) -> None:
        super().__init__()
        self.config = config
        self.plan = plan
        self.embedding = Embedding(
            config.vocab_size, config.padded_vocab_size, config.hidden_size, plan.mesh
        )
        self.positions = (
            nn.Embedding(config.max_positions, config.hidden_size)
            if config.positions == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            Block(config, index, make_linear, plan, recompute) for index in range(config.num_layers)
        )
        self.norm = FinalNorm(config.norm, config.hidden_size, config.norm_eps, plan.group)
        self.head = Head(
            config.vocab_size,
            config.padded_vocab_size,
            config.hidden_size,
            self.embedding.weight if config.tie_embeddings else None,
            plan.mesh,
        )

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``(B, S, V)`` of ``input_ids (B, S)``, or the loss if ``labels (B, S)`` are given.

        ``labels[b, t]`` is the target of position t (already shifted), -100 where there is none.
        The loss is a float32 scalar: the sum of -log p(label) over all targets.
        """
        if labels is None:
            return self.head(self.hidden_states(input_ids))
        return self.summed_loss(input_ids, labels)

    def summed_loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(label) over all targets, float32 scalar."""
        return self.head(self.hidden_states(input_ids), labels)

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``(B, S, h)``: what the head reads."""
        S = input_ids.shape[1]
        # (B, S, h); in layout bottleneck (B, S, h/p) from here to the last norm
        x = self.plan.start_residual(self.embedding(input_ids))
        rope = None
        if self.positions is not None:
            x = x + self.positions(torch.arange(S, device=x.device))
        else:
            rope = rope_tables(S, self.config.head_dim, self.config.rope_theta, x.device)
        mask = self._window_mask(S, x.device)
        added = torch.zeros_like(x)  # None would be a second kind of block to compile
        for block in self.blocks():
            x, added = block(x, rope, mask, added)
        return self.norm(self.plan.end_residual(x + added))

    def _window_mask(self, S: int, device: torch.device) -> torch.Tensor | None:
        """``(S, S)`` True where a position may look; None if plain causal attention does it."""
        window = self.config.sliding_window
        if window is None or window >= S:
            return None
        position = torch.arange(S, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance < window)

    def use_kernels(self, fuse_across_modules: bool = True) -> None:
        """Use the custom kernels wherever one takes the device, dtype and shape.

        ``fuse_across_modules``: also operators that use the weight of one module outside its own
        forward pass, or put the end of one module and the start of the next into one operator.
        """
        self.head.fuse_loss()
        self.embedding.fused = True
        for block in self.blocks():
            block.attention.fused = True
            if fuse_across_modules:
                block.fused = True
                block.mlp.fuse()

    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.layers if isinstance(block, Block)]

    def linears(self) -> Iterator[GroupedLinear]:
        """All groups of matrices of the blocks, in order."""
        return (module for module in self.modules() if isinstance(module, GroupedLinear))

    def factor_pairs(self) -> list[FactorPair]:
        """All factorized matrices, in order; empty for a dense model."""
        return [pair for linear in self.linears() for pair in linear.factor_pairs()]

    def factor_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold factors, also where their product is not a matrix (CoLA)."""
        factorized = (linear for linear in self.linears() if isinstance(linear, FactorizedLinear))
        return [parameter for linear in factorized for parameter in (linear.a, linear.b)]

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw all weights from ``seed`` and the tensors' names; biases are 0, norms 1."""
        std = self.config.initializer_range
        self.embedding.reset_parameters(seed, std)
        if self.positions is not None:
            init_rows(self.positions.weight, self.config.max_positions, seed, "positions", std)
        self.head.reset_parameters(seed, std)
        for linear in self.linears():
            linear.reset_parameters(seed, std)
