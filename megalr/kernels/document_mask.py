"""Which keys a query sees in a window of several documents, in the form that each kernel takes.

A query at place t sees the keys ``first[t] .. t``: those of its document, and of a sliding window
if there is one. Documents lie one after the other, so ``first`` never falls; so does ``end[t]``,
one past the last query that sees key t. All forms follow from these two, on the device, with shapes
that do not depend on the documents: a CUDA graph holds them.

| form | for |
|---|---|
| ``(3, B, S)`` int32: positions, first, end | kernels.attention |
| BlockMask | FlexAttention (arXiv 2412.05496), on a GPU in half precision |
| ``(B, 1, S, S)`` bool | scaled_dot_product_attention, everywhere |

Shapes: B batch, S sequence, N blocks of a sequence.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megalr.kernels import half_on_gpu

AttentionMask = Tensor | BlockMask | None
"""A form of the table above, ``(S, S)`` bool for all rows of a batch, or None: all keys up to t."""

BLOCK = 128
"""Rows of queries and of keys that FlexAttention skips or takes together."""

FLEX_SINCE = (2, 8)
"""torch from which FlexAttention takes part in selective activation checkpointing."""


def document_bounds(positions: Tensor, window: int | None = None) -> Tensor:
    """``(3, B, S)`` int32: positions, first key of each query, one past the last query of each key.

    Args:
        positions: ``(B, S)`` int32, place of each token in its document; 0 starts a document, and
            so does the first token of a row, whatever its position.
        window: of sliding-window attention, the query included; None: the whole document.
    """
    S = positions.shape[1]
    place = torch.arange(S, dtype=torch.int32, device=positions.device)
    first = (place - positions).clamp(min=0)
    # A document ends where the next one starts: the least start behind t, from the right.
    starts = torch.where(positions == 0, place, S)
    behind = torch.cat((starts[:, 1:], starts.new_full((len(starts), 1), S)), dim=1)
    end = behind.flip(1).cummin(1).values.flip(1)
    if window is not None:
        first = torch.maximum(first, place - (window - 1))
        end = torch.minimum(end, place + window)
    return torch.stack((positions, first, end.int()))


def is_bounds(mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask has the form of :func:`document_bounds`."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


def visible(bounds: Tensor) -> Tensor:
    """``(B, 1, S, S)`` bool, True where a query (third axis) sees a key (last axis)."""
    place = torch.arange(bounds.shape[2], device=bounds.device)
    return ((place <= place[:, None]) & (place >= bounds[1, :, :, None]))[:, None]


def flex_applies(x: Tensor, head_dim: int) -> bool:
    """Whether FlexAttention takes ``x (B, S, ...)``: half precision on a GPU, D a power of two."""
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    return (
        version >= FLEX_SINCE
        and half_on_gpu(x)
        and head_dim >= 16
        and head_dim & (head_dim - 1) == 0
    )


def block_mask(bounds: Tensor) -> BlockMask:
    """The mask for FlexAttention: which blocks of keys a block of queries sees, wholly or in part.

    For block i of queries these are the blocks from that of its first row's ``first`` to i; those
    from its last row's ``first`` on are seen wholly, except i itself, the diagonal. For a block of
    keys likewise with ``end``. Nothing of size S^2 is formed.
    """
    _, first, end = bounds
    B, S = first.shape
    N = -(-S // BLOCK)
    i = torch.arange(N, dtype=torch.int32, device=first.device)  # a block
    heads, lasts = i * BLOCK, (i * BLOCK + BLOCK - 1).clamp(max=S - 1)  # its rows
    begin = first[:, heads] // BLOCK  # (B, N) each, from here
    whole = ((first[:, lasts] + BLOCK - 1) // BLOCK).maximum(begin).minimum(i)
    if S % BLOCK:
        whole[:, -1] = N - 1  # a block that is not full is always masked
    stop = (end[:, lasts] - 1) // BLOCK + 1  # blocks of queries before this one see some key
    closed = (end[:, heads] // BLOCK).maximum(i + 1)  # and before this one, all of them
    counts = (whole - begin + 1, i - whole, stop - closed + 1, closed - (i + 1))
    k = i  # number of a block in a list, the last axis of (B, N, N)
    here, number = i[:, None], counts[0][..., None]
    indices = (
        torch.where(k < number - 1, begin[..., None] + k, here),  # in part: begin .. whole - 1, i
        whole[..., None] + k,  # wholly: whole .. i - 1
        torch.where(k == 0, here, closed[..., None] + k - 1),  # in part: i, closed .. stop - 1
        (here + 1 + k).expand(B, N, N),  # wholly: i + 1 .. closed - 1
    )
    num = [count.int()[:, None] for count in counts]  # (B, 1, N)
    lists = [index.clamp(max=N - 1).int()[:, None].contiguous() for index in indices]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[b, query])

    return BlockMask(
        seq_lengths=(S, S),
        kv_num_blocks=num[0],
        kv_indices=lists[0],
        full_kv_num_blocks=num[1],
        full_kv_indices=lists[1],
        q_num_blocks=num[2],
        q_indices=lists[2],
        full_q_num_blocks=num[3],
        full_q_indices=lists[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )


@cache
def _compiled() -> Any:
    """FlexAttention compiled by itself, for blocks that are not; it has no fast eager form."""
    return torch.compile(flex_attention, dynamic=False)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grouped: bool) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` where ``mask`` says so, of ``(B, heads, S, D)`` each."""
    run = flex_attention if torch.compiler.is_compiling() else _compiled()
    result: Tensor = run(q, k, v, block_mask=mask, enable_gqa=grouped)
    return result
