"""Triton kernel of the gradient of causal attention, and its launch.

A program takes whole (sequence, key head) tasks. With blocks of keys j outside and blocks of
queries i >= j inside, a pair of blocks needs five products and nothing is computed twice: dk_j and
dv_j stay in registers. dq_i is complete when i reaches the diagonal, j == i; until then its sum is
kept in float32 scratch that belongs to the program. There are only as many programs as run at once,
so the scratch is small enough to stay in the L2 cache, and no sum is atomic: results are the same
on every run.

The forward pass rotates q and k after each load. The backward pass, which would do so once a pair
of blocks, rotates them at the start of a task and keeps the result where dq and dk will be; these
are rotated back before they are stored. (The forward pass could hand rotated q and k on, but the
projections that v is a view of keep the raw ones alive, so that would be memory.)

With documents (kernels.document_mask) blocks of queries behind a key's ``end`` are skipped. Shapes,
strides and units as in attention_triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megalr.kernels import multiprocessors
from megalr.kernels.attention_triton import (
    angles,
    contiguous,
    contiguous_rows,
    load_rows,
    load_rows_as,
    load_vector,
    rotated,
    store_rows,
)


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes and launch options of the backward kernel; ``keys`` is a multiple of ``queries``.

    Attributes:
        queries, keys, warps, stages, registers: as in ForwardConfig.
        programs: programs per multiprocessor; each has its own scratch.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None


def backward_config(S: int) -> BackwardConfig:
    """The backward kernel's configuration for a sequence length, the same for all head widths."""
    return BackwardConfig(64, 64, 4, 1, 2) if S > 64 else BackwardConfig(32, 64, 4, 1, 2)


@triton.jit
def _store_rotated_back(
    base, stride, tile, rows, rope, positions, S,
    D: tl.constexpr, ROPE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store the gradient (rows, D) of rotated rows as the gradient of the rows themselves."""
    if ROPE:
        halves = tl.permute(tl.reshape(tile, (rows.shape[0], 2, D // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        cos, sin = angles(rope, positions, rows, S, D, EVEN)
        columns = tl.arange(0, D // 2)
        pointers = base + rows[:, None] * stride + columns[None, :]
        store_rows(pointers, first * cos + second * sin, rows, S, EVEN)
        store_rows(pointers + D // 2, second * cos - first * sin, rows, S, EVEN)
    else:
        pointers = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
        store_rows(pointers, tile, rows, S, EVEN)


@triton.jit
def _thread_order(tile, D: tl.constexpr, M: tl.constexpr):
    """The numbers of a product (D, M) as (M/8, 8 D), so that a thread holds runs of four.

    In the result of a tensor core product of four warps, row ``16 w + 8 h + r`` and column
    ``8 n + 2 c + e`` belong to thread (w, r, c). Stored as [n, w, r, c, h, e] a thread reads and
    writes 16 bytes beside those of its neighbours, and nothing moves between threads.
    """
    parts = tl.reshape(tile, (D // 16, 2, 8, M // 8, 4, 2))
    return tl.reshape(tl.permute(parts, (3, 0, 2, 4, 1, 5)), (M // 8, 8 * D))


@triton.jit
def _from_thread_order(tile, D: tl.constexpr, M: tl.constexpr):
    """The inverse of _thread_order: (M/8, 8 D) -> (D, M)."""
    parts = tl.reshape(tile, (M // 8, D // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (1, 4, 2, 0, 3, 5)), (D, M))


@triton.jit
def _store_rotated(
    target, stride, first, second, cos, sin, rows, S, D: tl.constexpr, EVEN: tl.constexpr
):
    """Store rows of q or k, given as halves, rotated."""
    first, second = rotated(first, second, cos, sin)
    pointers = target + rows[:, None] * stride + tl.arange(0, D // 2)[None, :]
    store_rows(pointers, first, rows, S, EVEN)
    store_rows(pointers + D // 2, second, rows, S, EVEN)


@triton.jit
def _prepare(
    dq, dq_stride, q, q_stride, dk, dk_stride, k, k_stride, deltas, do, do_stride, o, rope,
    positions, rows, S, D: tl.constexpr, ROPE: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Put rows of q, and of k if KEYS, rotated where dq and dk will be; delta = rowsum(do o).

    All loads come before the first store, which the compiler would not move them across: memory is
    waited for once. Rows from S on get delta 0, so that they add 0 to everything.
    """
    wide = tl.arange(0, D)[None, :]
    half = tl.arange(0, D // 2)[None, :]
    if ROPE:
        pointers = q + rows[:, None] * q_stride + half
        q_first = load_rows_as(pointers, rows, S, EVEN, "evict_first")
        q_second = load_rows_as(pointers + D // 2, rows, S, EVEN, "evict_first")
        if KEYS:
            pointers = k + rows[:, None] * k_stride + half
            k_first = load_rows_as(pointers, rows, S, EVEN, "evict_first")
            k_second = load_rows_as(pointers + D // 2, rows, S, EVEN, "evict_first")
    d_out = load_rows(do + rows[:, None] * do_stride + wide, rows, S, EVEN)
    out = load_rows_as(o + rows[:, None] * dq_stride + wide, rows, S, EVEN, "evict_first")
    if ROPE:
        cos, sin = angles(rope, positions, rows, S, D, EVEN)
        _store_rotated(dq, dq_stride, q_first, q_second, cos, sin, rows, S, D, EVEN)
        if KEYS:
            _store_rotated(dk, dk_stride, k_first, k_second, cos, sin, rows, S, D, EVEN)
    tl.store(deltas + rows, tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1))


@triton.jit
def _backward_step(
    dk, dv, key, value, q, q_stride, deltas, do, do_stride, lse, rope, positions, firsts, dq,
    dq_stride, sums, first, columns, start, scale, scale_log2, S, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, EVEN: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """One pair of blocks: add to dk, dv (N, D) and to dq, for good if on the diagonal.

    Scores are held transposed, (N, M), so that P^T and dS^T enter the products for dv and dk from
    registers. ``start``: of the block of keys; ``sums`` hold dq over those before it that the
    queries see. ``firsts``: first key of each query; None: key 0.
    """
    rows = first + tl.arange(0, M)
    wide = tl.arange(0, D)[None, :]
    query = load_rows_as(q + rows[:, None] * q_stride + wide, rows, S, EVEN, "evict_last")  # (M, D)
    d_out = load_rows_as(do + rows[:, None] * do_stride + wide, rows, S, EVEN, "evict_last")
    delta = tl.load(deltas + rows)  # (M)
    level = load_vector(lse, rows, S, EVEN)  # (M)
    kept = sums + first * D + tl.arange(0, M // 8)[:, None] * (8 * D) + tl.arange(0, 8 * D)[None, :]

    p = tl.exp2(tl.dot(key, tl.trans(query)) * scale_log2 - level[None, :])  # (N, M)
    earlier = start > 0
    if firsts is not None:
        seen = load_vector(firsts, rows, S, EVEN)
        p = tl.where(columns[:, None] >= seen[None, :], p, 0.0)
        before = start - tl.load(firsts + first) // N * N
        earlier = before > tl.zeros((M // 8, 8 * D), tl.int32)  # a scalar is no mask (interpreter)
    if DIAGONAL:
        p = tl.where(columns[:, None] <= rows[None, :], p, 0.0)
    dv = tl.dot(p.to(d_out.dtype), d_out, dv)
    d_query = tl.load(kept, mask=earlier, other=0.0, eviction_policy="evict_last")
    ds = p * (tl.dot(value, tl.trans(d_out)) - delta[None, :])  # (N, M)
    ds = ds.to(query.dtype)
    dk = tl.dot(ds, query, dk)

    # dq transposed, (D, M): D fills the 64 rows of a tensor core product however few queries M are.
    d_query = tl.dot(tl.trans(key), ds, _from_thread_order(d_query, D, M))
    if DIAGONAL:
        d_query = tl.trans(d_query) * scale
        _store_rotated_back(dq, dq_stride, d_query, rows, rope, positions, S, D, ROPE, EVEN)
    else:
        tl.store(kept, _thread_order(d_query, D, M), eviction_policy="evict_last")
    return dk, dv


@triton.jit
def _backward_steps(
    dk, dv, key, value, q, q_stride, deltas, do, do_stride, lse, rope, positions, firsts, dq,
    dq_stride, sums, columns, start, plane, scale, scale_log2, S, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The block of keys from ``start`` on with all blocks of queries that see some of it."""
    stop = S
    if firsts is not None:
        stop = tl.load(firsts + plane + tl.minimum(start + N, S) - 1)  # the end of its last key
    for first in tl.static_range(0, N, M):
        dk, dv = _backward_step(
            dk, dv, key, value, q, q_stride, deltas, do, do_stride, lse, rope, positions, firsts,
            dq, dq_stride, sums, start + first, columns, start, scale, scale_log2, S, D, M, N,
            ROPE, EVEN, True,
        )  # fmt: skip
    for first in range(start + N, stop, M):
        dk, dv = _backward_step(
            dk, dv, key, value, q, q_stride, deltas, do, do_stride, lse, rope, positions, firsts,
            dq, dq_stride, sums, first, columns, start, scale, scale_log2, S, D, M, N,
            ROPE, EVEN, False,
        )  # fmt: skip
    return dk, dv


@triton.jit
def backward_kernel(
    q, k, v, rope, documents, o, lse, do, dq, dk, dv, deltas, sums,
    q_batch, k_batch, v_batch, do_batch, scale, scale_log2, S, tasks, plane,
    q_stride: tl.constexpr, k_stride: tl.constexpr, v_stride: tl.constexpr,
    do_stride: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROPE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq (B, S, H*D), dk and dv (B, S, K*D) of causal attention with H = K * GROUP heads.

    Grid: any number of programs; they share the ``tasks`` = B * K out among themselves. With P as S
    rounded up to N, the scratch of a program is a piece of deltas (programs, GROUP, P) and of sums
    (programs, GROUP, P, D), both float32; there are no sums if P = N. N is a multiple of M; EVEN:
    S of N. documents, plane: as in forward_kernel. Until the gradients of a block are known, their
    place holds its rotated rows of q, k.
    """
    H: tl.constexpr = K * GROUP
    query_stride: tl.constexpr = H * D if ROPE else q_stride
    key_stride: tl.constexpr = K * D if ROPE else k_stride
    padded = tl.cdiv(S, N) * N
    mine = tl.program_id(0).to(tl.int64) * GROUP * padded
    deltas += mine
    sums += mine * D
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        batch = tl.cast(task // K, tl.int64)
        kv_head = task % K
        head = kv_head * GROUP  # the first of the group
        k_head = k + batch * k_batch + kv_head * D
        v_head = v + batch * v_batch + kv_head * D
        q_head = q + batch * q_batch + head * D
        do_head = do + batch * do_batch + head * D
        out = batch * S * H * D + head * D  # where o and dq of the group start
        shared = batch * S * K * D + kv_head * D  # where dk and dv of the head start
        positions, firsts = None, None
        if documents is not None:
            positions = documents + batch * S
            firsts = positions + plane
        # The threads of the program see each other's sums and deltas of the task before.
        tl.debug_barrier()
        for start in range(0, padded, M):
            rows = start + tl.arange(0, M)
            for member in tl.static_range(GROUP):
                _prepare(
                    dq + out + member * D, H * D, q_head + member * D, q_stride,
                    dk + shared, K * D, k_head, k_stride, deltas + member * padded,
                    do_head + member * D, do_stride, o + out + member * D, rope, positions, rows, S,
                    D, ROPE, member == 0, EVEN,
                )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, S, N):
            columns = start + tl.arange(0, N)
            wide = tl.arange(0, D)[None, :]
            key_rows = (dk + shared if ROPE else k_head) + columns[:, None] * key_stride
            key = load_rows(key_rows + wide, columns, S, EVEN)  # (N, D)
            value_rows = v_head + columns[:, None] * v_stride
            value = load_rows_as(value_rows + wide, columns, S, EVEN, "evict_first")
            d_key = tl.zeros((N, D), tl.float32)
            d_value = tl.zeros((N, D), tl.float32)
            for member in range(GROUP):
                query = dq + out + member * D if ROPE else q_head + member * D
                delta = deltas + member * padded
                kept = sums + member * padded * D
                d_out = do_head + member * D
                d_query = dq + out + member * D
                level = lse + (batch * H + head + member) * S
                d_key, d_value = _backward_steps(
                    d_key, d_value, key, value, query, query_stride, delta, d_out, do_stride, level,
                    rope, positions, firsts, d_query, H * D, kept, columns, start, plane, scale,
                    scale_log2, S, D, M, N, ROPE, EVEN,
                )  # fmt: skip
            _store_rotated_back(
                dk + shared, K * D, d_key * scale, columns, rope, positions, S, D, ROPE, EVEN
            )
            store_rows(dv + shared + columns[:, None] * (K * D) + wide, d_value, columns, S, EVEN)
            tl.debug_barrier()  # for the sums


def launch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    head_dim: int,
    config: BackwardConfig | None = None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, contiguous, in the shapes of q, k, v.

    Args:
        do: gradient of o, ``(B, S, H * D)``.
        q, k, v, rope, head_dim: as for :func:`launch_forward`.
        o, lse: its results.
        config: replaces :func:`backward_config`.
        out: tensors to write the results to.
        documents: as for the forward pass.
    """
    (B, S, width), D = q.shape, head_dim
    group, K = width // k.shape[2], k.shape[2] // D
    config = config or backward_config(S)
    q, k, v, do = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), contiguous_rows(do)
    dq, dk, dv = out or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    programs = min(B * K, multiprocessors(q.device) * config.programs)
    blocks = -(-S // config.keys)
    padded = blocks * config.keys
    deltas = q.new_empty(programs, group, padded, dtype=torch.float32)
    # With one block of keys every pair is on the diagonal, and no partial sum has to be stored.
    stored = padded if blocks > 1 else 0
    sums = q.new_empty(programs, group, stored, D, dtype=torch.float32)
    with torch.cuda.device_of(q):
        backward_kernel[(programs,)](
            q, k, v, contiguous(rope), contiguous(documents), o, lse, do, dq, dk, dv,
            deltas, sums, q.stride(0), k.stride(0), v.stride(0), do.stride(0),
            1 / math.sqrt(D), math.log2(math.e) / math.sqrt(D), S, B * K, B * S,
            q_stride=q.stride(1), k_stride=k.stride(1), v_stride=v.stride(1),
            do_stride=do.stride(1), K=K, GROUP=group, D=D, M=config.queries, N=config.keys,
            ROPE=rope is not None, EVEN=S % config.keys == 0,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return dq, dk, dv
