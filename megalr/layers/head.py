"""Language-model head and its loss, computed without a float32 copy of all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megalr.kernels.loss import (
    IGNORE,
    added,
    fused_loss_and_gradient_,
    has_fused_loss,
    scaled,
)
from megalr.layers.embedding import init_rows, vocabulary_shard
from megalr.layers.parallel_loss import ParallelLoss
from megalr.sharding.tensor_shard import part_of, set_shard
from megalr.tensor_parallel.collectives import gather
from megalr.tensor_parallel.mesh import ONE_RANK, Mesh

CHUNK_BYTES = 512 * 2**20
"""Size that one chunk of logits may have in the model's dtype."""


def chunk_length(tokens: int, rows: int, element: int) -> int:
    """Tokens of a chunk of logits of ``rows`` columns, ``element`` bytes a number.

    Chunks are equal, so that there is one shape to compile.
    """
    largest = max(1, CHUNK_BYTES // (rows * element))
    return -(-tokens // -(-tokens // largest))


def loss_and_gradient_(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Summed negative log likelihood of a chunk; ``logits`` are replaced by its gradient.

    Args:
        logits: ``(T, V)``; columns from ``vocab_size`` on are padding and take no probability.
            Afterwards d sum / d logits: zero in rows without target and in padded columns.
        labels: ``(T,)`` int64, ``IGNORE`` where a row has no target.

    Returns:
        ``sum -log softmax(logits)[label]``, float32 scalar.
    """
    z = logits.float()  # fused into the reductions when compiled
    column = torch.arange(logits.shape[1], device=logits.device)
    if vocab_size < logits.shape[1]:
        z = z.masked_fill(column >= vocab_size, float("-inf"))
    log_sum = torch.logsumexp(z, dim=-1, keepdim=True)  # (T, 1)
    kept = labels != IGNORE
    target = torch.where(kept, labels, 0).unsqueeze(1)  # (T, 1)
    nll = (log_sum - z.gather(1, target)).squeeze(1)
    gradient = torch.exp(z - log_sum) - (column == target).float()
    logits.copy_(torch.where(kept.unsqueeze(1), gradient, 0.0))
    return torch.where(kept, nll, 0.0).sum()


def _times(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What kernels.loss.scaled does, in plain PyTorch."""
    return (x.float() * factor).to(dtype)


def _plus(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """What kernels.loss.added does, in plain PyTorch."""
    return total.float().add_(part)


class Arithmetic(NamedTuple):
    """Elementwise work on gradients around the chunks, by torch or by kernels of our own."""

    plus: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    times: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


PLAIN = Arithmetic(_plus, _times)
FUSED = Arithmetic(added, scaled)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of ``x W^T`` in chunks of tokens; gradients are formed in the forward pass.

    So only one chunk of logits exists at any time, nothing is computed twice, and W is not needed
    in the backward pass (ZeRO-3 gathers it once).
    """

    @staticmethod
    def forward(ctx, x, weight, labels, vocab_size, chunk, kernel, arithmetic, need_gradient):
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
                grad_w = part if grad_w is None else arithmetic.plus(grad_w, part)
                del part
        if grad_w is not None:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.times = arithmetic.times
        return total

    @staticmethod
    def backward(ctx, grad_output):
        # In float32: a factor rounded to bf16 would be wrong by up to 0.4 % in every gradient.
        grad_x, grad_w = ctx.saved_tensors
        grad_w = ctx.times(grad_w, grad_output, grad_x.dtype)
        grad_x = ctx.times(grad_x, grad_output, grad_x.dtype)
        return grad_x, grad_w, None, None, None, None, None, None


class Head(nn.Module):
    """Output layer ``logits = x W^T`` with W ``(V, h)``, V the padded vocabulary.

    Args:
        vocab_size: entries of the model's vocabulary.
        padded_vocab_size: rows stored; those from ``vocab_size`` on are zero and never probable.
        hidden_size: h.
        weight: the embedding's parameter to tie the head to, or None for a weight of its own.
        mesh: the ranks over which the rows of W are cut. The gradient of x is then a partial sum,
            and the logits of all ranks are never brought together for the loss.
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
        self.start, stop = part_of(padded_vocab_size, mesh.tensor_rank, mesh.tensor_size)
        rows = stop - self.start
        self.weight = weight if weight is not None else nn.Parameter(torch.empty(rows, hidden_size))
        set_shard(self.weight, vocabulary_shard(padded_vocab_size, hidden_size, mesh))
        self.kernel: Callable[..., torch.Tensor] = loss_and_gradient_
        self.arithmetic = PLAIN
        if self.group is not None:
            self.kernel = ParallelLoss(self.group, self.start)

    def compile_loss(self) -> None:
        """Compile the loss kernel, so that no float32 copy of a chunk is stored either."""
        if isinstance(self.kernel, ParallelLoss):
            self.kernel.compile()
        elif self.kernel is loss_and_gradient_:
            self.kernel = torch.compile(loss_and_gradient_, dynamic=False)

    def fuse_loss(self) -> None:
        """Use kernels of our own where there are some; for the loss, if the logits are whole."""
        if has_fused_loss(self.weight.device):
            self.arithmetic = FUSED
            if self.group is None:
                self.kernel = fused_loss_and_gradient_

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Draw W from N(0, std^2); padded rows are zero. A tied head has nothing to draw."""
        if not self.tied:
            init_rows(self.weight, self.vocab_size, seed, "head", std, self.start)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``(B, S, vocab_size)``, or the summed loss (float32) if ``labels`` are given."""
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
            self.arithmetic,
            torch.is_grad_enabled(),
        )
