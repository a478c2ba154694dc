"""Moments in 8 bits: one code per element and one scale per block of 256 elements.

Block-wise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861): a block is divided by its
largest magnitude, and each element is replaced by the nearest of 255 values that lie dense near
zero on a logarithmic scale: each decade 10^-e, e = 0 ... 6, has half as many as the one
above. Code 0 is the value zero, so that zeroing codes zeroes the moments. First moments use signed
codes (int8), second moments unsigned ones (uint8) with twice the resolution. Relative error within
a decade: at most about 1 % near the block's maximum, more for smaller elements.
"""

from __future__ import annotations

from functools import lru_cache

import torch

BLOCK = 256
# Smaller tensors stay in fp32: their scales and codes would save nothing that matters.
MINIMUM = 4096


@lru_cache(maxsize=8)
def _levels(signed: bool, device: torch.device) -> torch.Tensor:
    """Positive values of the codes 1, 2, ... in ascending order; the last is 1. fp32."""
    first = 6 if signed else 7
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (first - exponent) + 1, dtype=torch.float64)
        decades.append(10.0**-exponent * (edges[:-1] + edges[1:]) / 2)
    values = torch.cat(decades).sort().values
    if signed:
        values[-1] = 1.0
    else:
        values = torch.cat([values, torch.ones(1, dtype=torch.float64)])
    return values.float().to(device)


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of the same shape, fp32 scales (b, blocks)) of a batch of b tensors (b, ...).

    Blocks of 256 elements in row-major order of each tensor.
    """
    flat = values.float().flatten(1)
    count = -(-flat.shape[1] // BLOCK)
    blocks = torch.nn.functional.pad(flat, (0, count * BLOCK - flat.shape[1]))
    blocks = blocks.view(len(flat), count, BLOCK)
    scales = blocks.abs().amax(dim=2)
    unit = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    levels = torch.cat([unit.new_zeros(1), _levels(signed, values.device)])
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(unit.abs(), middles)  # index of the nearest level
    if signed:
        codes = torch.where(unit < 0, -codes, codes)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    return codes.flatten(1)[:, : flat.shape[1]].reshape(values.shape), scales


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`encode`: fp32 values of the shape of ``codes``."""
    signed = codes.dtype == torch.int8
    positive = _levels(signed, codes.device)
    table = torch.cat([positive.new_zeros(1), positive])
    if signed:  # negative codes index the table from its end
        table = torch.cat([table, -positive.flip(0)])
    flat = codes.flatten(1)
    values = table[flat.long()] if signed else table[flat.int()]
    spread = scales.repeat_interleave(BLOCK, dim=1)[:, : flat.shape[1]]
    return (values * spread).view(codes.shape)
