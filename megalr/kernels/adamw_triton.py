"""Triton kernels of AdamW over many bf16 tensors; launched by kernels.adamw.

Two launches per parameter group: one thread per tensor increments the step and computes the bias
corrections, then one program per chunk of ``BLOCK`` elements updates them. Programs find their
tensors in a table of addresses, so the number of launches does not grow with that of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megalr.kernels.stochastic_rounding import (
    INCREMENT,
    MULTIPLIERS,
    StochasticRounding,
    keys_of,
    log_of,
)

BLOCK, WARPS = 2048, 8
"""Elements of a program, and its warps: 8 elements per thread, one 16-byte load from each of four
tensors, so 16 KiB of loads in flight. Memory of 4.8 TB/s with a latency near 1 us needs 21 KiB of
loads and 16 KiB of stores in flight on each of an H200's 132 multiprocessors. A thread uses 48
registers: five programs at a time, some of which wait for their row of the table."""

COLUMNS = tl.constexpr(7)
"""Columns of the table: addresses of weight, gradient, both moments and step; elements; number of
the first element (kernels.stochastic_rounding)."""

MULTIPLIER1, MULTIPLIER2 = (tl.constexpr(number) for number in MULTIPLIERS)
INCREMENT_ = tl.constexpr(INCREMENT)

TENSORS = 128
"""Tensors that a program of the first kernel handles."""


@triton.jit
def _count_step(
    table, corrections, found_inf, log_beta1, log_beta2, tensors, TENSORS: tl.constexpr
):
    """step += 1 - found_inf; 1 - beta1^t and sqrt(1 - beta2^t) at t = step + 1 before that.

    Float64: 1 - 0.999 in float32 would lose three digits, and there is only one per tensor.
    """
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    inside = tensor < tensors
    address = tl.load(table + tensor * COLUMNS + 4, mask=inside, other=0)
    counter = address.to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=inside, other=0.0) + 1.0
    exact = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(exact * log_beta1)
    correction2 = 1.0 - tl.exp(exact * log_beta2)
    tl.store(corrections + tensor * 2, correction1.to(tl.float32), mask=inside)
    tl.store(corrections + tensor * 2 + 1, tl.sqrt(correction2).to(tl.float32), mask=inside)
    if found_inf is not None:
        step -= tl.load(found_inf)
    tl.store(counter, step, mask=inside)


@triton.jit
def _load(pointers, inside, FULL: tl.constexpr):
    """Float32 values; FULL: no mask, which would hide their contiguity from the compiler."""
    if FULL:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, values, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= MULTIPLIER1
    x ^= x >> 13
    x *= MULTIPLIER2
    return x ^ (x >> 16)


@triton.jit
def _random_words(number, key0, key1):
    """stochastic_rounding.random_words of int64 numbers, as uint32."""
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    one = _mix(low ^ key0.to(tl.uint32, bitcast=True))
    one = _mix(one + high * INCREMENT_ + key1.to(tl.uint32, bitcast=True))
    return one, _mix(one + INCREMENT_)


@triton.jit
def _rounded(values, noise, STOCHASTIC: tl.constexpr):
    """stochastic_rounding.round_to_bf16; to nearest if not STOCHASTIC."""
    bits = values.to(tl.uint32, bitcast=True)
    if not STOCHASTIC:
        noise = 0x7FFF + ((bits >> 16) & 1)
    special = (bits & 0x7F800000) == 0x7F800000
    added = bits + tl.where(special, 0, noise)
    added = tl.where((added & 0x7F800000) == 0x7F800000, bits, added)
    added |= tl.where(values != values, 0x400000, 0).to(tl.uint32)  # NaN stays NaN when cut
    return (added >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update_chunk(
    weights, gradients, firsts, seconds, inside, step_size, inverse2, inverse_scale,
    decay, beta1, rest1, beta2, rest2, eps, number, key0, key1,
    FULL: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """One chunk, in the order of torch's kernel; moments are used before they are rounded.

    The gradient is not written, while torch's kernel would store it unscaled. ``number`` is that of
    each element; MOMENTS, WEIGHTS: rounded stochastically, with root and quotient rounded as torch
    does, so that the PyTorch reference gets the same bits.
    """
    p = _load(weights, inside, FULL)
    g = _load(gradients, inside, FULL)
    m = _load(firsts, inside, FULL)
    v = _load(seconds, inside, FULL)
    g *= inverse_scale
    p -= decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    if MOMENTS or WEIGHTS:
        one, two = _random_words(number, key0, key1)
        p -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * inverse2 + eps)
        _store(weights, _rounded(p, two >> 16, WEIGHTS), inside, FULL)
        _store(firsts, _rounded(m, one & 0xFFFF, MOMENTS), inside, FULL)
        _store(seconds, _rounded(v, one >> 16, MOMENTS), inside, FULL)
    else:
        p -= step_size * m / (tl.sqrt(v) * inverse2 + eps)
        _store(weights, p, inside, FULL)
        _store(firsts, m, inside, FULL)
        _store(seconds, v, inside, FULL)


@triton.jit
def _bf16(address):
    """The address as a pointer; only tensors aligned to 16 bytes get here."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit(do_not_specialize=["key0", "key1"])
def _update(
    table, chunks, corrections, grad_scale, found_inf, lr, decay, beta1, rest1, beta2, rest2, eps,
    key0, key1, BLOCK: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The chunk of this program; nothing is stored where ``found_inf`` is 1."""
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    row = table + tensor * COLUMNS
    weights = _bf16(tl.load(row)) + first
    gradients = _bf16(tl.load(row + 1)) + first
    firsts = _bf16(tl.load(row + 2)) + first
    seconds = _bf16(tl.load(row + 3)) + first
    left = tl.load(row + 5) - first
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 1.0, 0, left)
    # Reciprocals once per program: a division for every element took more registers.
    step_size = tl.div_rn(lr, tl.load(corrections + 2 * tensor))
    inverse2 = tl.div_rn(1.0, tl.load(corrections + 2 * tensor + 1))
    inverse_scale = 1.0
    if grad_scale is not None:
        inverse_scale = tl.div_rn(1.0, tl.load(grad_scale))
    column = tl.arange(0, BLOCK)
    number = tl.load(row + 6) + first + column
    if left >= BLOCK:
        _update_chunk(
            weights + column, gradients + column, firsts + column, seconds + column, column < left,
            step_size, inverse2, inverse_scale, decay, beta1, rest1, beta2, rest2, eps,
            number, key0, key1, True, MOMENTS, WEIGHTS,
        )  # fmt: skip
    elif left > 0:
        _update_chunk(
            weights + column, gradients + column, firsts + column, seconds + column, column < left,
            step_size, inverse2, inverse_scale, decay, beta1, rest1, beta2, rest2, eps,
            number, key0, key1, False, MOMENTS, WEIGHTS,
        )  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Addresses of the n tensors of a group, for the kernels.

    Attributes:
        addresses: those of ``table``, on the host, to notice that a tensor has moved.
        sizes: elements of the tensors, on the host.
        table: ``(n, 7)`` int64, see ``COLUMNS``.
        chunks: ``(programs, 2)`` int32, tensor and index of the chunk within it.
        corrections: ``(n, 2)`` float32, bias corrections from the first kernel to the second.
    """

    addresses: list[int]
    sizes: list[int]
    table: torch.Tensor
    chunks: torch.Tensor
    corrections: torch.Tensor


def make_tables(
    addresses: list[int],
    sizes: list[int],
    device: torch.device,
    old: Tables | None,
    numbers: list[int] | None = None,
) -> Tables:
    """Tables on ``device`` of n tensors; reuses the parts of ``old`` that still apply.

    Args:
        addresses: 5 n numbers, for each tensor those of weight, gradient, moments and step.
        sizes: elements of each tensor.
        device: of the tables.
        old: tables of an earlier call.
        numbers: of each tensor's first element, for stochastic rounding.
    """
    where = torch.tensor(addresses, dtype=torch.int64).view(-1, 5)
    count = torch.tensor(sizes, dtype=torch.int64).view(-1, 1)
    first = torch.tensor(numbers or [0] * len(sizes), dtype=torch.int64).view(-1, 1)
    table = _to(torch.cat((where, count, first), dim=1), device)
    if old is not None and old.sizes == sizes and old.table.device == device:
        return Tables(addresses, sizes, table, old.chunks, old.corrections)
    corrections = torch.empty(len(sizes), 2, dtype=torch.float32, device=device)
    return Tables(addresses, sizes, table, _to(_chunks(count.view(-1)), device), corrections)


def _to(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An asynchronous copy; torch keeps the pinned memory until it has been read."""
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def _chunks(sizes: torch.Tensor) -> torch.Tensor:
    """``(programs, 2)`` int32, tensor and index of the chunk, for tensors of ``sizes (n,)``."""
    counts = (sizes + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.stack((tensor, torch.arange(len(tensor)) - first[tensor]), dim=1).int()


def update_(
    tables: Tables,
    group: dict[str, Any],
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding: StochasticRounding | None = None,
) -> None:
    """One update of the tensors in ``tables`` with lr, betas, eps and weight_decay of ``group``.

    Args:
        tables: of the group.
        group: options of the optimizer.
        grad_scale: float32 scalar on the device; the gradients are divided by it.
        found_inf: likewise; if it is 1 nothing changes.
        rounding: what is rounded stochastically; ``group`` then has ``update``, its number.
    """
    keys = (0, 0) if rounding is None else keys_of(rounding.seed, group["update"])
    lr, eps = float(group["lr"]), float(group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    tensors = len(tables.sizes)
    with torch.cuda.device_of(tables.table):
        _count_step[(triton.cdiv(tensors, TENSORS),)](
            tables.table, tables.corrections, found_inf, log_of(beta1), log_of(beta2), tensors,
            TENSORS=TENSORS,
        )  # fmt: skip
        if len(tables.chunks):
            _update[(len(tables.chunks),)](
                tables.table, tables.chunks, tables.corrections, grad_scale, found_inf,
                lr, lr * float(group["weight_decay"]), beta1, 1 - beta1, beta2, 1 - beta2, eps,
                *keys, BLOCK=BLOCK, MOMENTS=rounding is not None and rounding.moments,
                WEIGHTS=rounding is not None and rounding.weights, num_warps=WARPS,
                # Products and sums are rounded one by one, as the PyTorch reference does.
                enable_fp_fusion=rounding is None,
            )  # fmt: skip
