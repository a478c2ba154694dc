"""PyTorch stand-ins for the kernels, so that their path through a decoder runs on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import megalr.layers.embedding
import megalr.models.attention
import megalr.models.decoder
from megalr.kernels.attention import apply_rope, attention_reference
from megalr.kernels.document_mask import is_bounds, visible


@contextlib.contextmanager
def kernels_on_the_cpu() -> Iterator[list[int]]:
    """The operators are used on the CPU; gives the numbers of tensors that attention is given."""
    seen: list[int] = []

    def forward(projections: Any, rope: Any, head_dim: int, documents: Any) -> Any:
        seen.append(len(projections))
        return _forward(projections, rope, head_dim, documents)

    with (
        mock.patch.object(megalr.models.attention, "attention_applies", _takes),
        mock.patch.object(megalr.models.decoder, "half_on_gpu", lambda _: True),
        mock.patch.object(megalr.models.decoder, "add_norm_applies", lambda _: True),
        mock.patch.object(megalr.layers.embedding, "half_on_gpu", lambda _: True),
        torch.library._scoped_library("megalr", "IMPL") as library,
    ):
        library.impl("causal_attention", forward, "CPU")
        library.impl("causal_attention_backward", _backward, "CPU")
        yield seen
    torch._dynamo.reset()


def _takes(x: Any, mask: Any, head_dim: int) -> bool:
    return mask is None or is_bounds(mask)


def _three(projections: Any) -> Any:
    return projections[0].unbind() if len(projections) == 1 else projections


def _per_row(rope: Any, documents: Any) -> Any:
    """Tables for each row of the batch, at the positions in the documents."""
    return rope if documents is None or rope is None else rope[:, documents[0].long()].unsqueeze(2)


def _forward(projections: Any, rope: Any, head_dim: int, documents: Any) -> Any:
    mask = None if documents is None else visible(documents)
    rope = _per_row(rope, documents)
    y = attention_reference(*_three(projections), rope, mask, head_dim)
    return y, y.new_empty(y.shape[0], y.shape[2] // head_dim, y.shape[1], dtype=torch.float32)


def _backward(
    do: Any, projections: Any, rope: Any, o: Any, lse: Any, head_dim: int, documents: Any
) -> Any:
    """By hand: inside an operator autograd records nothing."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, H|K, S, D)

    q, k, v = map(heads, _three(projections))
    group, scale = q.shape[1] // k.shape[1], head_dim**-0.5
    rope = _per_row(rope, documents)
    q, k = (x if rope is None else apply_rope(x, rope) for x in (q, k))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    hidden = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    if documents is not None:
        hidden = ~visible(documents)
    p = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    dp = heads(do) @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ heads(do)))
    grads = [ds @ k, dk, dv]
    if rope is not None:
        back = torch.stack((rope[0], -rope[1]))
        grads[:2] = [apply_rope(x, back) for x in grads[:2]]
    grads = [x.transpose(1, 2).flatten(2) for x in grads]
    return [torch.stack(grads)] if len(projections) == 1 else grads
