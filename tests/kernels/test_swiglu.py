"""SwiGLU with the product that follows equals plain autograd (kernels by Triton's interpreter)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalr.kernels.swiglu import swiglu_product, swiglu_product_backward
from tests.kernels.where import DEVICE, needs_triton

SHAPES = {
    "apart": [(2, 7, 10), (2, 7, 10)],
    "side by side": [(2, 7, 20)],
    "one behind the other": [(2, 2, 7, 10)],
}


def _inputs(form: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    projections = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES[form]]
    return projections, torch.randn(6, 10, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("form", SHAPES)
def test_values_and_gradients_in_float64(form: str) -> None:
    projections, w = _inputs(form, torch.float64)
    gate, up = projections if form == "apart" else projections[0].chunk(2, dim=-1)
    if form == "one behind the other":
        gate, up = projections[0]
    weights = torch.randn(2, 7, 6, dtype=torch.float64)
    results = []
    for y in (swiglu_product(projections, w), F.linear(F.silu(gate) * up, w)):
        results.append((y.detach(), torch.autograd.grad((y * weights).sum(), (*projections, w))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", SHAPES)
def test_operator_is_registered_as_compilation_needs_it(form: str) -> None:
    projections, w = _inputs(form, torch.float32)
    torch.library.opcheck(swiglu_product, (projections, w))
    arguments = (torch.randn(2, 7, 6), [p.detach() for p in projections], w.detach())
    torch.library.opcheck(swiglu_product_backward, arguments)


@needs_triton
@pytest.mark.parametrize("stride", [2000, 4000])
def test_kernels_equal_float64(stride: int) -> None:
    """Rows of a wider tensor, more columns than a block."""
    from megalr.kernels.swiglu_triton import swiglu_backward_, swiglu_forward

    torch.manual_seed(0)
    both = torch.randn(3, stride, device=DEVICE).bfloat16()
    gate, up = both[:, :1500], torch.randn(3, 1500, device=DEVICE).bfloat16()
    d = torch.randn(3, 1500, device=DEVICE).bfloat16()
    g, u = (x.double().requires_grad_() for x in (gate, up))
    expected = F.silu(g) * u
    expected.backward(d.double())
    hidden, dgate, dup = d.clone(), torch.empty_like(up), torch.empty_like(up)
    swiglu_backward_(gate, up, hidden, dgate, dup)
    for found, exact in (
        (swiglu_forward(gate, up), expected),
        (hidden, expected),
        (dgate, g.grad),
        (dup, u.grad),
    ):
        # the interpreter truncates where a GPU rounds to nearest
        torch.testing.assert_close(found.double(), exact.detach(), rtol=2**-7, atol=1e-6)
