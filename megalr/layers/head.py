"""The language-model head and its loss, without a float32 copy of all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megalr.kernels.loss import (
    REFERENCE_OPS,
    TRITON_OPS,
    fused_loss_and_gradient_,
    has_fused_loss,
    loss_and_gradient_reference_,
)
from megalr.layers.embedding import init_rows, vocabulary_shard
from megalr.layers.parallel_loss import ParallelLoss
from megalr.sharding.tensor_shard import set_shard, shard_range
from megalr.tensor_parallel.collectives import gather
from megalr.tensor_parallel.mesh import ONE_RANK, Mesh

CHUNK_BYTES = 512 * 2**20
"""Most bytes of one chunk of logits, in the model's dtype."""


def chunk_length(tokens: int, rows: int, element: int) -> int:
    """Tokens in a chunk of logits of ``rows`` columns, ``element`` bytes per number.

    Chunks are equal (but for the last), so that there is one shape to compile.
    """
    largest = max(1, CHUNK_BYTES // (rows * element))
    return -(-tokens // -(-tokens // largest))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of ``x W^T`` in chunks of tokens; gradients are computed in the forward pass.

    Only one chunk of logits exists at any time, nothing is computed twice, and the backward pass
    does not need W. As in Liger's FusedLinearCrossEntropy (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, labels, vocab_size, chunk, kernel, ops, need_gradient):
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if need_gradient else None
        grad_w = None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            gradient = F.linear(x[rows], weight)  # (chunk, V): logits until the kernel has run
            total += kernel(gradient, labels[rows], vocab_size)
            if grad_x is not None:
                torch.mm(gradient, weight, out=grad_x[rows])
                part = gradient.t() @ x[rows]  # (V, h)
            del gradient  # before the sum and the next chunk are made
            if grad_x is not None:
                # Chunks are added in float32: their number must not cost precision.
                grad_w = part if grad_w is None else ops.add(grad_w, part)
                del part
        if grad_w is not None:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.scale = ops.scale
        return total

    @staticmethod
    def backward(ctx, grad_output):
        # In float32: a factor rounded to bf16 would be wrong by up to 0.4 % in every gradient.
        grad_x, grad_w = ctx.saved_tensors
        grad_w = ctx.scale(grad_w, grad_output, grad_x.dtype)
        grad_x = ctx.scale(grad_x, grad_output, grad_x.dtype)
        return grad_x, grad_w, None, None, None, None, None, None


class Head(nn.Module):
    """Output layer ``logits = x W^T`` with W ``(V, h)``, V the padded vocabulary.

    Args:
        vocab_size: entries of the model's vocabulary.
        padded_vocab_size: rows stored; those from ``vocab_size`` on are zero and never probable.
        hidden_size: h.
        weight: the embedding's parameter, to tie the head to it; None for a separate weight.
        mesh: the ranks over which the rows of W are sharded. The gradient of x is then a partial
            sum, and the logits of all ranks are never gathered for the loss.

    Attributes:
        draw_scale: factor of the standard deviation of its draw.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_vocab_size: int,
        hidden_size: int,
        weight: nn.Parameter | None = None,
        mesh: Mesh = ONE_RANK,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.group = mesh.tensor_group
        self.tied = weight is not None
        self.start, stop = shard_range(padded_vocab_size, mesh.tensor_rank, mesh.tensor_size)
        rows = stop - self.start
        self.weight = weight if weight is not None else nn.Parameter(torch.empty(rows, hidden_size))
        set_shard(self.weight, vocabulary_shard(padded_vocab_size, hidden_size, mesh))
        self.kernel: Callable[..., torch.Tensor] = loss_and_gradient_reference_
        self.ops = REFERENCE_OPS
        self.draw_scale = 1.0
        if self.group is not None:
            self.kernel = ParallelLoss(self.group, self.start)

    def compile_loss(self) -> None:
        """Compile the loss kernel, so that no float32 copy of a chunk is stored either."""
        if isinstance(self.kernel, ParallelLoss):
            self.kernel.compile()
        elif self.kernel is loss_and_gradient_reference_:
            self.kernel = torch.compile(loss_and_gradient_reference_, dynamic=False)

    def fuse_loss(self) -> None:
        """Use the custom kernels on a GPU; that of the loss only if the logits are not sharded."""
        if has_fused_loss(self.weight.device):
            self.ops = TRITON_OPS
            if self.group is None:
                self.kernel = fused_loss_and_gradient_

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw W from N(0, (draw_scale std)^2); padded rows are zero. A tied head is not drawn."""
        if not self.tied:
            std = self.draw_scale * std
            init_rows(self.weight, self.vocab_size, seed, "head", std, self.start)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``(B, S, vocab_size)`` of ``x (B, S, h)``, in the dtype of x.

        With ``labels (B, S)`` int64 (-100: no target) the summed loss instead, a float32 scalar.
        """
        if labels is None:
            return gather(F.linear(x, self.weight), self.group)[..., : self.vocab_size]
        tokens = labels.numel()
        chunk = chunk_length(tokens, self.weight.shape[0], x.element_size())
        return _LinearCrossEntropy.apply(
            x.reshape(tokens, x.shape[-1]),  # (B S, h)
            self.weight,
            labels.reshape(-1),
            self.vocab_size,
            chunk,
            self.kernel,
            self.ops,
            torch.is_grad_enabled(),
        )
