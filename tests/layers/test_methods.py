"""SLTrain, LoRA and CoLA layers against dense autograd on the same weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalr.errors import UserError
from megalr.layers.cola import CoLALinear
from megalr.layers.factors import LinearShape
from megalr.layers.linear import GroupedLinear
from megalr.layers.lora import LoRALinear
from megalr.layers.sltrain import SLTrainLinear, draw_support

# Two matrices of 10 x 9 and 6 x 9, stored padded to 12 x 12 and 8 x 12.
SHAPE = LinearShape(("x.q", "x.k"), 12, (12, 8), 9, (10, 6))


def _layer(kind: str, bias: bool) -> GroupedLinear:
    layer: GroupedLinear
    if kind == "sltrain":
        layer = SLTrainLinear(SHAPE, 3, 6.0, 0.3, seed=1, bias=bias)
    elif kind == "lora":
        layer = LoRALinear(SHAPE, 3, 6.0, bias=bias)
    else:
        layer = CoLALinear(SHAPE, 3, bias=bias)
    layer.double()
    layer.reset_parameters(1, 0.5)
    with torch.no_grad():  # B = 0 would prove little
        for index, rows in enumerate(SHAPE.out_used):
            layer.b[layer.used_rows(index)] = torch.randn(rows, 3, dtype=torch.double)
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def _input() -> torch.Tensor:
    x = torch.randn(2, 5, 12, dtype=torch.double)
    x[..., 9:] = 0  # columns beyond in_used carry nothing
    return x.requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["sltrain", "lora", "cola"])
def test_outputs_and_gradients_equal_dense_autograd(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = _layer(kind, bias), _input()
    outputs = layer(x)
    weights = [torch.randn_like(y) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    trained = [p for p in layer.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, [x, *trained])

    expected_outputs = []
    biases = layer.bias.split(SHAPE.out_features) if bias else (None, None)
    for i, (start, stop) in enumerate(SHAPE.row_ranges()):
        a, b = layer.a[3 * i : 3 * i + 3], layer.b[start:stop]
        if kind == "cola":
            y = F.silu(x @ a.t()) @ b.t()
        else:
            w = 2.0 * b @ a  # alpha / r = 2
            if kind == "lora":
                w = w + layer.weight[start:stop]
            else:
                stack = torch.zeros(20, 12, dtype=torch.double)
                stack = stack.view(-1).index_put((layer.support.long(),), layer.values)
                w = w + stack.view(20, 12)[start:stop]
            y = x @ w.t()
        expected_outputs.append(y if biases[i] is None else y + biases[i])
    expected_loss = sum((y * w).sum() for y, w in zip(expected_outputs, weights, strict=True))
    expected = torch.autograd.grad(expected_loss, [x, *trained])
    for found, wanted in zip((*outputs, *ours), (*expected_outputs, *expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_support_is_uniform_without_repeats_and_depends_on_seed_and_name_only() -> None:
    support = draw_support(3, "layers.0.attention.q", 50, 40, 0.1)
    assert len(support) == len(set(support.tolist())) == 200
    assert support.min() >= 0 and support.max() < 2000
    assert (np.diff(support) > 0).all()
    assert np.array_equal(support, draw_support(3, "layers.0.attention.q", 50, 40, 0.1))
    assert not np.array_equal(support, draw_support(4, "layers.0.attention.q", 50, 40, 0.1))
    assert not np.array_equal(support, draw_support(3, "layers.0.attention.k", 50, 40, 0.1))
    many = np.concatenate([draw_support(s, "w", 10, 10, 0.2) for s in range(400)])
    counts = np.bincount(many, minlength=100)  # 80 expected at each position, deviation 8
    assert counts.min() > 45 and counts.max() < 120


def test_sltrain_starts_as_its_sparse_part_and_keeps_padding_free() -> None:
    layer = SLTrainLinear(SHAPE, 3, 6.0, 0.3, seed=1)
    layer.reset_parameters(1, 0.5)
    assert layer.support.dtype == torch.int32
    assert layer.counts == [math.floor(0.3 * 90), math.floor(0.3 * 54)]
    for index, rows in enumerate(SHAPE.out_used):
        w = layer.dense_weight(index)
        assert w.shape == (rows, 9)
        assert torch.count_nonzero(w) == layer.counts[index]
        assert w.abs().max().item() <= 1 / 3  # 1 / sqrt(n)
    stack = torch.zeros(20, 12).view(-1)
    stack[layer.support.long()] = 1
    used = torch.zeros(20, 12, dtype=torch.bool)
    used[:10, :9] = used[12:18, :9] = True
    assert stack.view(20, 12)[~used].sum() == 0


def test_sltrain_keeps_no_dense_matrix_for_the_backward_pass() -> None:
    shape = LinearShape(("w",), 64, (64,), 64, (64,))
    layer = SLTrainLinear(shape, 4, 4.0, 0.05, seed=0)
    layer.reset_parameters(0, 0.02)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        layer(torch.randn(3, 64, requires_grad=True))
    assert max(saved) < 64 * 64 / 4
    assert sum(saved) < 64 * 64 / 2


@pytest.mark.parametrize("kind", ["sltrain", "lora"])
def test_loading_a_dense_matrix(kind: str) -> None:
    torch.manual_seed(1)
    layer = _layer(kind, False)
    weight = torch.randn(6, 9)
    before = layer.dense_weight(0)
    layer.load_dense(1, weight)
    torch.testing.assert_close(layer.dense_weight(0), before)
    found = layer.dense_weight(1)
    if kind == "lora":
        torch.testing.assert_close(found, weight)
        return
    u, s, vh = np.linalg.svd(weight.double().numpy())
    rest = weight.double() - torch.from_numpy((u[:, :3] * s[:3]) @ vh[:3])
    support = layer.sparse_weight(1) != 0
    torch.testing.assert_close(found[support], weight[support], rtol=1e-5, atol=1e-5)
    low_rank_error = (weight - found)[~support].double()
    torch.testing.assert_close(low_rank_error, rest[~support], rtol=1e-4, atol=1e-4)


def test_lora_factors_train_from_the_first_step() -> None:
    """Published code starts with A = B = 0, whose gradients are always zero."""
    layer = LoRALinear(SHAPE, 3, 6.0)
    layer.reset_parameters(0, 0.02)
    x = _input().float().detach()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    frozen = layer.weight.clone()
    for _ in range(2):
        loss = sum((y - 1).square().sum() for y in layer(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.count_nonzero(layer.b) > 0
    assert torch.count_nonzero(layer.a.grad) > 0
    assert torch.equal(layer.weight, frozen) and layer.weight.grad is None
    assert isinstance(layer.weight, nn.Parameter)


def test_cola_has_the_documented_variance_and_no_dense_weight() -> None:
    shape = LinearShape(("w",), 300, (200,), 300, (200,))
    layer = CoLALinear(shape, 64)
    layer.reset_parameters(0, 0.02)
    sigma = 64**-0.25 * 500**-0.25
    assert layer.a.std().item() == pytest.approx(sigma, rel=0.03)
    assert layer.b.std().item() == pytest.approx(sigma, rel=0.03)
    assert layer.factor_pairs() == []
    with pytest.raises(UserError, match="no dense weight"):
        layer.dense_weight(0)
