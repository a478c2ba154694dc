"""The chunked loss equals torch's cross entropy, with and without padding and chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalr.layers import head as head_module
from megalr.layers.head import Head


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("padded", [50, 64])
def test_loss_and_gradients_equal_torch(
    monkeypatch: pytest.MonkeyPatch, padded: int, chunk_rows: int
) -> None:
    torch.manual_seed(0)
    head = Head(50, padded, 12)
    head.reset_parameters(0, 0.5)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_rows * padded * 4)
    x = torch.randn(4, 16, 12, requires_grad=True)
    labels = torch.randint(0, 50, (4, 16))
    labels[1, 3:] = -100

    expected = F.cross_entropy(
        F.linear(x, head.weight[:50]).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    expected_grads = torch.autograd.grad(expected * 0.37, (x, head.weight))
    loss = head(x, labels)
    grads = torch.autograd.grad(loss * 0.37, (x, head.weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(grads[1][50:]) == 0
    with torch.no_grad():
        torch.testing.assert_close(head(x, labels), expected, rtol=1e-6, atol=1e-5)


def test_bf16_loss_is_that_of_float32_on_the_same_logits() -> None:
    torch.manual_seed(0)
    head = Head(300, 300, 32).to(torch.bfloat16)
    head.reset_parameters(0, 0.3)
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16)
    labels = torch.randint(0, 300, (2, 40))
    logits = F.linear(x, head.weight).flatten(0, 1)
    expected = F.cross_entropy(logits.float(), labels.flatten(), reduction="sum")
    torch.testing.assert_close(head(x, labels), expected, rtol=1e-6, atol=1e-4)


def test_scale_of_the_loss_is_not_rounded_to_bf16() -> None:
    torch.manual_seed(0)
    head = Head(60, 60, 16).to(torch.bfloat16)
    head.reset_parameters(0, 0.3)
    x = torch.randn(1, 64, 16, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 60, (1, 64))
    scale = (1 + 1 / 256) / 512  # half-way between two bf16 numbers, 0.39 % from either
    (whole,) = torch.autograd.grad(head(x, labels), x)
    (scaled,) = torch.autograd.grad(head(x, labels) * scale, x)
    expected = (whole.double() * scale).to(torch.bfloat16)  # rounded once
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0)
    rounded_scale = (whole.double() * torch.tensor(scale).bfloat16().double()).bfloat16()
    assert not torch.equal(scaled, rounded_scale)


def test_all_labels_ignored_is_zero_loss_and_zero_gradient() -> None:
    head = Head(10, 16, 4)
    head.reset_parameters(0, 0.5)
    x = torch.randn(1, 3, 4, requires_grad=True)
    loss = head(x, torch.full((1, 3), -100))
    loss.backward()
    assert float(loss) == 0.0
    assert torch.count_nonzero(x.grad) == 0
    assert torch.count_nonzero(head.weight.grad) == 0
