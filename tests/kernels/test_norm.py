"""Residual sum and RMSNorm equal plain autograd (kernels by Triton's interpreter)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalr.kernels.norm import add_norm
from tests.kernels.where import DEVICE, needs_triton

EPS = 1e-5


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, added = (torch.randn(2, 7, 12, dtype=dtype, requires_grad=True) for _ in range(2))
    return x, added, (1 + torch.randn(12, dtype=dtype)).requires_grad_()


def _plain(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + added
    return total, F.rms_norm(total, weight.shape, weight, EPS)


def test_values_and_gradients_in_float64() -> None:
    """Both results get a gradient, as in a decoder."""
    inputs = _inputs(torch.float64)
    weights = torch.randn(2, 2, 7, 12, dtype=torch.float64)
    results = []
    for total, y in (add_norm(*inputs, EPS), _plain(*inputs)):
        loss = (total * weights[0] + y * weights[1]).sum()
        results.append((total.detach(), y.detach(), torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_one_result_alone() -> None:
    """The other's gradient is zero then."""
    inputs = _inputs(torch.float64)
    for which in (0, 1):
        found = torch.autograd.grad(add_norm(*inputs, EPS)[which].square().sum(), inputs)
        loss = _plain(*inputs)[which].square().sum()
        expected = torch.autograd.grad(loss, inputs, materialize_grads=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_operator_is_registered_as_compilation_needs_it() -> None:
    torch.library.opcheck(torch.ops.megalr.add_norm.default, (*_inputs(torch.float32), EPS))
    x, added, weight = (tensor.detach() for tensor in _inputs(torch.float32))
    arguments = (x, added, x, weight, torch.rand(2, 7))
    torch.library.opcheck(torch.ops.megalr.add_norm_backward.default, arguments)


@needs_triton
@pytest.mark.parametrize(("rows", "width"), [(5, 300), (1, 64), (40, 1024)])
def test_kernels_equal_float64(rows: int, width: int) -> None:
    """Widths that are no power of two, several vectors a program, several blocks of columns."""
    from megalr.kernels import norm_triton

    torch.manual_seed(0)
    x, added, dtotal, dy = (torch.randn(rows, width, device=DEVICE).bfloat16() for _ in range(4))
    weight = (1 + torch.randn(width, device=DEVICE)).bfloat16()
    total, y, factor = norm_triton.add_norm_forward(x, added, weight, EPS)
    # the interpreter truncates where a GPU rounds to nearest
    torch.testing.assert_close(total.double(), x.double() + added.double(), rtol=2**-7, atol=0)
    exact, w = total.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.rms_norm(exact, (width,), w, EPS)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=2**-7, atol=1e-6)
    mean = exact.detach().square().mean(dim=-1)
    torch.testing.assert_close(factor.double(), torch.rsqrt(mean + EPS), rtol=1e-5, atol=0)
    (expected * dy.double() + exact * dtotal.double()).sum().backward()
    dx, dweight = norm_triton.add_norm_backward(dtotal, dy, total, weight, factor)
    assert exact.grad is not None and w.grad is not None
    torch.testing.assert_close(dx.double(), exact.grad, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(dweight.double(), w.grad, rtol=2**-7, atol=1e-4)
    assert dx.dtype == dweight.dtype == torch.bfloat16
