"""DLR against its published form, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megalr.layers.cola import CoLALinear
from megalr.layers.factors import LinearShape
from megalr.layers.latent_residual import LatentResidual
from megalr.layers.low_rank import LowRankLinear

# Three matrices of 10 x 9, 6 x 9 and 10 x 9, stored padded to 12 x 12, 8 x 12 and 12 x 12.
SHAPE = LinearShape(("x.q", "x.k", "x.v"), 12, (12, 8, 12), 9, (10, 6, 10))
RANK, ALPHA, STRENGTH = 4, 6.0, 0.7
CONFIG = {"bias": True, "dlr_alpha": STRENGTH}


def _layer(kind: str, shape: LinearShape = SHAPE) -> LowRankLinear | CoLALinear:
    layer: LowRankLinear | CoLALinear
    if kind == "cola":
        layer = CoLALinear(shape, RANK, **CONFIG)
    else:
        layer = LowRankLinear(shape, RANK, ALPHA, "normal", **CONFIG)
    layer.double().reset_parameters(1, 0.02)
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    return layer


def _expanded(z: torch.Tensor, rows: int) -> torch.Tensor:
    """alpha / sqrt(K) z[floor(o / K)] for the outputs o < rows, zero for the padding."""
    copies = math.ceil(rows / RANK)
    spread = z.repeat_interleave(copies, dim=-1)[..., :rows]
    return STRENGTH / math.sqrt(copies) * spread


@pytest.mark.parametrize("kind", ["low_rank", "cola"])
def test_outputs_and_gradients_are_those_of_the_published_form(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    x[..., 9:] = 0
    x.requires_grad_()
    outputs = layer(x)
    weights = [torch.randn_like(y) for y in outputs]
    trained = [x, layer.a, layer.b, layer.bias]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, trained)
    expected = []
    for index, (start, stop) in enumerate(SHAPE.row_ranges()):
        z = x @ layer.a[RANK * index : RANK * (index + 1)].mT
        z = F.silu(z) if kind == "cola" else ALPHA / RANK * z
        y = z @ layer.b[start:stop].mT
        rows = SHAPE.out_used[index]
        y = y + F.pad(_expanded(z, rows), (0, stop - start - rows))
        expected.append(y + layer.bias[start:stop])
    loss = sum((y * w).sum() for y, w in zip(expected, weights, strict=True))
    wanted = torch.autograd.grad(loss, trained)
    for one, other in zip((*outputs, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_dense_and_the_stored_matrix_hold_the_offset_and_the_factors_do_not() -> None:
    layer = _layer("low_rank")
    for index, rows in enumerate(SHAPE.out_used):
        a, b = (factor.double() for factor in layer.used_factors(index))
        scale = ALPHA / RANK
        identity = torch.eye(RANK, dtype=torch.float64)
        whole = b + _expanded(identity, rows).mT
        stored = layer.stored_matrix(index)
        torch.testing.assert_close(stored["b"].double(), scale * whole, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(stored["a"].double(), a, rtol=1e-6, atol=1e-7)
        dense = layer.dense_weight(index).double()
        torch.testing.assert_close(dense, scale * whole @ a, rtol=1e-6, atol=1e-7)
    sigma = (RANK * (9 + 10)) ** -0.25
    assert layer.a.detach().abs().max() < 5 * sigma


def test_a_matrix_is_loaded_as_well_as_without_the_offset() -> None:
    layer, weight = _layer("low_rank"), torch.randn(6, 9)
    before = layer.dense_weight(0)
    layer.load_dense(1, weight)
    u, s, vh = torch.linalg.svd(weight.double())
    best = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    torch.testing.assert_close(layer.dense_weight(1).double(), best, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dense_weight(0), before)


@pytest.mark.parametrize("rows, rank", [(10, 4), (12, 4), (7, 7), (5, 1), (64, 10), (3, 3)])
def test_any_rows_of_the_offset_are_those_of_the_whole(rows: int, rank: int) -> None:
    copies = math.ceil(rows / rank)
    whole = torch.zeros(rows, rank, dtype=torch.float64)
    for row in range(rows):
        whole[row, row // copies] = 0.3 / math.sqrt(copies)
    for first in range(rows + 1):
        for stop in range(first, rows + 1):
            residual = LatentResidual.of(rows, rank, 0.3, slice(first, stop))
            padded = torch.ones(stop - first + 2, rank, dtype=torch.float64)
            found = residual.add_to(padded, -2.0)
            assert torch.equal(found[:-2], 1 - 2 * whole[first:stop])
            assert torch.equal(found[-2:], torch.ones(2, rank, dtype=torch.float64))
