"""Arithmetic and memory traffic of one micro-batch on one rank.

A matrix product of (M x K) and (K x N) takes ``2 M N K`` operations and moves ``M K + K N + M N``
numbers; products with a small inner dimension (the rank) are bound by what they move. Elementwise
work between the products, fused by torch.compile, is counted in passes over the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalr.estimate.tensors import DENSE_INSIDE, MatrixGroup, different_blocks, matrix_groups
from megalr.kernels.attention import HEAD_WIDTHS, MAX_LENGTH
from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.plan import Plan

Product = tuple[float, float, float]
"""M, N, K of a matrix product."""

SCATTER_BYTES = 96
"""Bytes moved for one entry of a sparse matrix: whole memory sectors are read and written."""

ATTENTION_SHARE = 0.5
"""Speed of fused attention relative to large matrix products."""

ATTENTION_BLOCK = 128
"""Positions that fused attention treats together: on the diagonal it computes half too many."""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of forward, or of backward."""

    flops: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times)


def product(shape: Product, element: int) -> Work:
    """One matrix product."""
    m, n, k = shape
    return Work(2 * m * n * k, element * (m * k + k * n + m * n))


def micro_batch_work(
    sizes: DecoderConfig,
    method: Any,
    plan: Plan,
    batch: int,
    sequence: int,
    element: int = 2,
    recompute: str = "none",
) -> tuple[Work, Work]:
    """(forward, backward) of ``batch`` sequences on one rank, the head included in forward.

    The head's gradients are formed in forward (layers.head). Backward repeats what the level
    ``recompute`` of activation checkpointing asks for.
    """
    tokens = batch * sequence
    h, rows = sizes.hidden_size, sizes.padded_vocab_size / plan.mesh.tensor_size
    # logits, gradients of the input and of the weight; the loss reads and writes them (the second
    # reading of a row finds it in the cache)
    head = product((tokens, rows, h), element) * 3
    head += Work(moved=element * tokens * (2 * rows + 4 * h))
    head += Work(moved=12 * rows * h)  # float32 sum of the weight's gradient
    embedding = Work(moved=element * (2 * tokens * h + rows * h))
    forward, backward = head + embedding, embedding
    for layer, times in different_blocks(sizes, method).items():
        block = sizes, method, plan, batch, sequence, element
        ahead, back = block_work(*block, layer)
        forward += ahead * times
        backward += (back + repeated_work(*block, recompute, layer)) * times
    return forward, backward


def repeated_work(
    sizes: DecoderConfig,
    method: Any,
    plan: Plan,
    batch: int,
    sequence: int,
    element: int,
    level: str,
    layer: int = 0,
) -> Work:
    """What the block ``layer`` computes again in backward, by the table of models.recompute."""
    if level == "none":
        return Work()
    if level == "full":
        return block_work(sizes, method, plan, batch, sequence, element, layer)[0]
    work, _ = passes(sizes, plan, batch * sequence, sequence, element)
    if level == "bottleneck":
        work += _attention(sizes, plan, batch, sequence, element)[0]
    again = {"mlp": ("o", "into"), "bottleneck": ("qkv", "o", "into")}.get(level, ())
    for group in matrix_groups(sizes, method, plan, layer):
        if group.name in again:
            for m, rank in zip(group.local_rows, group.ranks, strict=True):
                work += product((batch * sequence, m, rank), element)
    return work


def block_work(
    sizes: DecoderConfig,
    method: Any,
    plan: Plan,
    batch: int,
    sequence: int,
    element: int = 2,
    layer: int = 0,
) -> tuple[Work, Work]:
    """(forward, backward) of the block ``layer``."""
    tokens = batch * sequence
    forward, backward = _attention(sizes, plan, batch, sequence, element)
    for group in matrix_groups(sizes, method, plan, layer):
        for part in group.layers():
            for ahead, back in _linear(part, method, tokens, element):
                forward, backward = forward + ahead, backward + back
    ahead, back = passes(sizes, plan, tokens, sequence, element)
    return forward + ahead, backward + back


def passes(
    sizes: DecoderConfig, plan: Plan, tokens: float, sequence: int, element: int
) -> tuple[Work, Work]:
    """(forward, backward) of what lies between a block's products."""
    t = plan.mesh.tensor_size
    h = sizes.hidden_size
    residual = h / t if plan.sharded_residual else h
    f = sizes.padded_intermediate_size / t
    # Norms and sums of the residual stream; turning q and k where attention does not; gate * up.
    turned = 0 if sequence <= MAX_LENGTH and sizes.head_width in HEAD_WIDTHS else sizes.q_width / t
    forward = Work(moved=element * tokens * (9 * residual + 4 * turned + 3 * f))
    return forward, Work(moved=element * tokens * (16 * residual + 6 * turned + 6 * f))


def _attention(
    sizes: DecoderConfig, plan: Plan, batch: int, sequence: int, element: int
) -> tuple[Work, Work]:
    q, tokens = sizes.q_width / plan.mesh.tensor_size, batch * sequence
    window = min(sizes.sliding_window or sequence, sequence)
    visible = (window * (window + 1) / 2 + (sequence - window) * window) / sequence
    computed = min(sequence, visible + ATTENTION_BLOCK / 2)
    flops = 4 * tokens * q * computed / ATTENTION_SHARE
    return Work(flops, element * tokens * 4 * q), Work(2.5 * flops, element * tokens * 8 * q)


def _linear(
    group: MatrixGroup, method: Any, tokens: float, element: int
) -> Iterator[tuple[Work, Work]]:
    """(forward, backward) of the products of matrices that are stored together."""
    n, rows = group.local_n, sum(group.local_rows)
    if not group.factorized:
        work = product((tokens, rows, n), element)
        yield work, work * 2
        return
    r, count = group.ranks[0], len(group.rows)
    if method.name == "sltrain":
        yield from _sltrain(group, method, tokens, element)
        return
    narrow = product((tokens, count * r, n), element)
    yield narrow, narrow * 2
    for m in group.local_rows:
        wide = product((tokens, m, r), element)
        yield wide, wide * 2
    if method.name in DENSE_INSIDE:
        frozen = product((tokens, rows, n), element)
        added = Work(moved=element * tokens * 3 * rows)
        yield frozen + added, frozen + added


def _sltrain(
    group: MatrixGroup, method: Any, tokens: float, element: int
) -> Iterator[tuple[Work, Work]]:
    """W = BA + S is formed once; backward forms D = dY'X and reads the small gradients off it."""
    n, rows = group.local_n, sum(group.local_rows)
    dense = product((tokens, rows, n), element)
    entries = Work(moved=SCATTER_BYTES * method.density * rows * n)
    factors = Work()
    for m in group.local_rows:
        factors += product((m, n, group.ranks[0]), element)
    yield dense + factors + entries, dense * 2 + factors * 2 + entries
