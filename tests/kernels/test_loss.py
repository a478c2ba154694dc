"""The fused loss equals torch's cross entropy (on the CPU by Triton's interpreter)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megalr.kernels.loss import IGNORE, add_float32, scale_float32
from tests.kernels.where import DEVICE, needs_triton

pytestmark = needs_triton


def _rows(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    from megalr.kernels.loss_triton import rows_

    return rows_(logits, labels, vocab_size, IGNORE, block=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "vocab_size"), [(192, 192), (192, 150), (64, 50)])
def test_equals_cross_entropy(dtype: torch.dtype, width: int, vocab_size: int) -> None:
    """Losses by row and the gradient, with padded columns and rows without a target."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(7, width, device=DEVICE)).to(dtype)
    labels = torch.randint(0, vocab_size, (7,), device=DEVICE)
    labels[2] = IGNORE
    reference = logits.double()[:, :vocab_size].requires_grad_()
    expected = F.cross_entropy(reference, labels, reduction="none", ignore_index=IGNORE)
    expected.sum().backward()
    assert reference.grad is not None
    nll = _rows(logits, labels, vocab_size)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits[:, :vocab_size].double(), reference.grad, rtol=tolerance, atol=tolerance
    )
    assert not logits[:, vocab_size:].any()


def test_not_finite_logits_give_a_loss_that_is_not_finite() -> None:
    """Bad updates are detected by it."""
    for bad in (math.nan, math.inf):
        logits = torch.randn(2, 64, device=DEVICE)
        logits[1, 5] = bad
        nll = _rows(logits, torch.tensor([3, 4], device=DEVICE), 64)
        assert math.isfinite(nll[0]) and not math.isfinite(nll[1])


def test_elementwise_kernels_equal_torch() -> None:
    """One rounding each; a size that is no multiple of a block."""
    torch.manual_seed(0)
    total, part = torch.randn(3, 999, device=DEVICE), torch.randn(3, 999, device=DEVICE).bfloat16()
    assert torch.equal(add_float32(part, part), 2 * part.float())
    expected = total + part
    assert torch.equal(add_float32(total, part), expected)
    assert torch.equal(total, expected)  # in place
    factor = torch.tensor(1 / 3, device=DEVICE)
    for x in (total, part):
        exact = x.double() * factor.double()
        assert scale_float32(x, factor, torch.bfloat16).dtype == torch.bfloat16
        # the interpreter truncates where a GPU rounds to nearest
        found = scale_float32(x, factor, torch.bfloat16).double()
        torch.testing.assert_close(found, exact, rtol=2**-7, atol=0)
        found = scale_float32(x, factor, torch.float32).double()
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
