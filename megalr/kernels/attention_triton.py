"""Triton kernel of causal attention with rotary positions inside, and its launch.

One program for each (sequence, head, block of queries) walks over the blocks of keys up to the
diagonal with a running maximum, as FlashAttention does (arXiv 2307.08691), and rotates q and k in
registers after each load. Scores are kept in units of log 2 (exp2 is one instruction).

With documents (kernels.document_mask) a query sees the keys from its ``first`` on; blocks of keys
before are skipped. Rotary tables are read at the positions. The backward pass is in
attention_backward_triton, which uses the functions for tiles below.

Shapes: M queries and N keys in a block, D head width. q, k, v are as projected:
(B, S, heads * D), rows and sequences at any stride. Strides of rows and numbers of heads are
compile-time constants: addresses are then constants too and take no registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes and launch options of the forward kernel.

    Attributes:
        queries, keys: rows of a block of queries and of keys.
        warps, stages: of a program; pipeline stages of its loop.
        registers: limit per thread, None for the compiler's. Fewer registers let more programs run
            at once on a multiprocessor.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def forward_config(S: int) -> ForwardConfig:
    """The forward kernel's configuration for a sequence length, the same for all head widths."""
    return ForwardConfig(64, 64, 4, 1, 128) if S > 64 else ForwardConfig(64, 64, 4, 1)


@triton.jit
def load_rows_as(pointers, rows, S, EVEN: tl.constexpr, CACHE: tl.constexpr):
    """A tile of whole rows; rows from S on are 0. EVEN: there are none.

    CACHE: evict_first for data that is read once, evict_last for data that is read again.
    """
    if EVEN:
        return tl.load(pointers, eviction_policy=CACHE)
    else:
        return tl.load(pointers, mask=(rows < S)[:, None], other=0.0, eviction_policy=CACHE)


@triton.jit
def load_rows(pointers, rows, S, EVEN: tl.constexpr):
    """The same without a hint."""
    return load_rows_as(pointers, rows, S, EVEN, "")


@triton.jit
def store_rows(pointers, tile, rows, S, EVEN: tl.constexpr):
    """Store the rows of a tile below S, in the dtype of the target."""
    tile = tile.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(rows < S)[:, None])


@triton.jit
def angles(rope, positions, rows, S, D: tl.constexpr, EVEN: tl.constexpr):
    """Cosines and sines (rows, D/2) of tables (2, S, D) whose halves repeat each other.

    ``positions``: of the rows in their documents; None: the rows themselves.
    """
    columns = tl.arange(0, D // 2)
    places = rows
    if positions is not None:
        places = load_vector(positions, rows, S, EVEN)
    pointers = rope + places[:, None] * D + columns[None, :]
    return load_rows(pointers, rows, S, EVEN), load_rows(pointers + S * D, rows, S, EVEN)


@triton.jit
def load_vector(base, rows, S, EVEN: tl.constexpr):
    """One number a row; rows from S on are 0."""
    if EVEN:
        return tl.load(base + rows)
    else:
        return tl.load(base + rows, mask=rows < S, other=0.0)


@triton.jit
def rotated(first, second, cos, sin):
    """Both halves (rows, D/2) of rows of q or k, rotated in float32."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _load_rotated(
    base, stride, rows, rope, positions, S, D: tl.constexpr, ROPE: tl.constexpr, EVEN: tl.constexpr
):
    """Rows (rows, D) of q or k, rotated in float32 and rounded to their dtype again."""
    if ROPE:
        pointers = base + rows[:, None] * stride + tl.arange(0, D // 2)[None, :]
        first = load_rows(pointers, rows, S, EVEN)
        second = load_rows(pointers + D // 2, rows, S, EVEN)
        cos, sin = angles(rope, positions, rows, S, D, EVEN)
        first, second = rotated(first, second, cos, sin)
        # (rows, D/2, 2) -> (rows, 2, D/2) -> (rows, D): renames registers, moves nothing
        both = tl.permute(tl.join(first, second), (0, 2, 1))
        return tl.reshape(both, (rows.shape[0], D)).to(base.dtype.element_ty)
    else:
        return load_rows(base + rows[:, None] * stride + tl.arange(0, D)[None, :], rows, S, EVEN)


@triton.jit
def _forward_step(
    acc, total, top, q, k, k_stride, v, v_stride, rope, positions, first, rows, start, scale, S,
    D: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys [start, start + N) into sums (M, D), totals (M) and running maxima (M).

    ``first``: the first keys (M) that the rows see; None: key 0.
    """
    columns = start + tl.arange(0, N)
    # v first: a load behind the barrier that the rotated keys need would be waited for apart.
    value = load_rows(v + columns[:, None] * v_stride + tl.arange(0, D)[None, :], columns, S, EVEN)
    key = _load_rotated(k, k_stride, columns, rope, positions, S, D, ROPE, EVEN)
    scores = tl.dot(q, tl.trans(key))  # (M, N)
    if MASKED:
        scores = tl.where(rows[:, None] >= columns[None, :], scores, float("-inf"))
    if first is not None:
        scores = tl.where(columns[None, :] >= first[:, None], scores, float("-inf"))
    # Finite from the first block on without documents: key 0 is open to every row.
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    level = new_top
    if first is not None:
        level = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far
    p = tl.exp2(scores * scale - level[:, None])  # one fused multiply-add
    shrink = tl.exp2(top - level)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    return acc, total, new_top


@triton.jit
def forward_kernel(
    q, k, v, rope, documents, o, lse,
    q_batch, k_batch, v_batch, scale, S, plane,
    q_stride: tl.constexpr, k_stride: tl.constexpr, v_stride: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROPE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """o (B, S, H*D) and lse (B, H, S) = log2 of the sums of exp2(scores); scale includes log2(e).

    Grid: blocks of queries * H * B. EVEN: S is a multiple of M and of N. documents: (3, B, S) int32
    of kernels.document_mask, None for none; plane: B * S.
    """
    blocks = tl.cdiv(S, M)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
    task = tl.program_id(0) // blocks
    head = task % H
    batch = (task // H).to(tl.int64)
    q += batch * q_batch + head * D
    k += batch * k_batch + head // GROUP * D
    v += batch * v_batch + head // GROUP * D

    rows = block * M + tl.arange(0, M)
    positions, first = None, None
    begin = 0
    if documents is not None:
        positions = documents + batch * S
        firsts = positions + plane
        first = load_vector(firsts, rows, S, EVEN)
        begin = tl.load(firsts + block * M) // N * N  # what no row of the block sees comes before
    query = _load_rotated(q, q_stride, rows, rope, positions, S, D, ROPE, EVEN)
    acc = tl.zeros((M, D), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    below = block * M // N * N  # keys before this are open to all rows of the block
    for start in range(begin, below, N):
        acc, total, top = _forward_step(
            acc, total, top, query, k, k_stride, v, v_stride, rope, positions, first, rows, start,
            scale, S, D, N, ROPE, EVEN, False,
        )  # fmt: skip
    for start in range(tl.maximum(begin, below), tl.minimum(block * M + M, S), N):
        acc, total, top = _forward_step(
            acc, total, top, query, k, k_stride, v, v_stride, rope, positions, first, rows, start,
            scale, S, D, N, ROPE, EVEN, True,
        )  # fmt: skip
    o += batch * S * H * D + head * D
    pointers = o + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    store_rows(pointers, acc / total[:, None], rows, S, EVEN)
    tl.store(lse + (batch * H + head) * S + rows, top + tl.log2(total), mask=rows < S)


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension is contiguous, as the kernels read it; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(table: torch.Tensor | None) -> torch.Tensor | None:
    """The table without gaps, if there is one."""
    return None if table is None else table.contiguous()


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    head_dim: int,
    config: ForwardConfig | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o ``(B, S, H * D)`` and, float32, log2 of the sums of exp(scores) ``(B, H, S)``.

    Inputs as kernels.attention.attention takes and checks them; ``config`` replaces
    :func:`forward_config`.
    """
    (B, S, width), D = q.shape, head_dim
    H, group = width // D, width // k.shape[2]
    config = config or forward_config(S)
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    o = q.new_empty(B, S, width)
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    with torch.cuda.device_of(q):
        forward_kernel[(-(-S // config.queries) * H * B,)](
            q, k, v, contiguous(rope), contiguous(documents), o, lse,
            q.stride(0), k.stride(0), v.stride(0), math.log2(math.e) / math.sqrt(D), S, B * S,
            q_stride=q.stride(1), k_stride=k.stride(1), v_stride=v.stride(1), H=H, GROUP=group,
            D=D, M=config.queries, N=config.keys,
            ROPE=rope is not None, EVEN=S % max(config.queries, config.keys) == 0,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return o, lse
