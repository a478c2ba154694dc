"""Matrices of one input with different ranks: each is the layer that it would be by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megalr.layers.cola import CoLALinear
from megalr.layers.factors import LinearShape
from megalr.layers.linear import FactorizedLinear
from megalr.layers.lora import LoRALinear
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.mixed_ranks import MixedRankLinear
from megalr.layers.sltrain import SLTrainLinear

# 10 x 9, 6 x 9 and 7 x 9, stored padded to 12 columns and 12, 8, 8 rows.
SHAPE = LinearShape(("x.q", "x.k", "x.v"), 12, (12, 8, 8), 9, (10, 6, 7))
RANKS = (3, 5, 3)
ALPHA = 6.0
MAKE: dict[str, Callable[[LinearShape, int], FactorizedLinear]] = {
    "low_rank": lambda shape, rank: LowRankLinear(shape, rank, ALPHA, "kaiming"),
    "sltrain": lambda shape, rank: SLTrainLinear(shape, rank, ALPHA, 0.3, 1),
    "lora": lambda shape, rank: LoRALinear(shape, rank, ALPHA),
    "cola": lambda shape, rank: CoLALinear(shape, rank),
}


def _layer(kind: str) -> MixedRankLinear:
    layer = MixedRankLinear(SHAPE, RANKS, MAKE[kind], bias=True).double()
    layer.reset_parameters(1, 0.5)
    with torch.no_grad():  # B = 0 would prove little
        for index in range(3):
            part, place = layer.layer_of(index)
            _, b = part.used_factors(place)
            b.copy_(torch.randn_like(b))
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("kind", MAKE)
def test_outputs_and_gradients_equal_the_algebra_in_float64(kind: str) -> None:
    torch.manual_seed(0)
    layer = _layer(kind)
    x = torch.randn(2, 5, 12, dtype=torch.double)
    x[..., 9:] = 0
    x.requires_grad_()
    outputs = layer(x)
    assert [y.shape[-1] for y in outputs] == [12, 8, 8]
    weights = [torch.randn_like(y) for y in outputs]
    trained = [p for p in layer.parameters() if p.requires_grad]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    ours = torch.autograd.grad(loss, [x, *trained])

    expected_outputs = []
    for index, rank in enumerate(RANKS):
        part, place = layer.layer_of(index)
        start, stop = part.shape.row_ranges()[place]
        a, b = part.a[place * rank : (place + 1) * rank], part.b[start:stop]
        assert part.rank == rank and part.scale == (1 if kind == "cola" else ALPHA / rank)
        if kind == "cola":
            y = F.silu(x @ a.T) @ b.T
        else:
            w = ALPHA / rank * b @ a
            if kind == "lora":
                w = w + part.weight[start:stop]
            if kind == "sltrain":
                stack = torch.zeros(sum(part.sizes) * 12, dtype=torch.double)
                stack = stack.index_put((part.support.long(),), part.values)
                w = w + stack.view(-1, 12)[start:stop]
            y = x @ w.T
        expected_outputs.append(y + layer.bias.split(SHAPE.out_features)[index])
    expected_loss = sum((y * w).sum() for y, w in zip(expected_outputs, weights, strict=True))
    expected = torch.autograd.grad(expected_loss, [x, *trained])
    for found, wanted in zip((*outputs, *ours), (*expected_outputs, *expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MAKE)
def test_a_matrix_is_drawn_and_counted_as_in_a_group_of_its_rank(kind: str) -> None:
    layer = MixedRankLinear(SHAPE, RANKS, MAKE[kind])
    layer.reset_parameters(1, 0.5)
    counted = 0
    for index, rank in enumerate(RANKS):
        alone = MAKE[kind](SHAPE.subset([index]), rank)
        alone.reset_parameters(1, 0.5)
        assert all(
            torch.equal(found, alone.stored_matrix(0)[key])
            for key, found in layer.stored_matrix(index).items()
        )
        counted += alone.weight_count()
    assert layer.weight_count() == counted
    names = [pair.name for pair in layer.factor_pairs()]
    assert names == ([] if kind == "cola" else list(SHAPE.names))
    assert [pair.rank for pair in layer.factor_pairs()] == ([] if kind == "cola" else list(RANKS))


def test_loading_a_matrix_truncates_it_at_its_own_rank() -> None:
    torch.manual_seed(1)
    layer = MixedRankLinear(SHAPE, RANKS, MAKE["low_rank"])
    layer.reset_parameters(1, 0.5)
    for index, rank in enumerate(RANKS):
        weight = torch.randn(SHAPE.out_used[index], 9, dtype=torch.double)
        layer.load_dense(index, weight)
        u, s, vh = torch.linalg.svd(weight)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(layer.dense_weight(index).double(), best, atol=1e-6, rtol=1e-5)
