"""The SLTrain operator against dense autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megalr.layers.sparse_product import (
    dense_stack,
    gradients,
    sparse_low_rank,
    sparse_low_rank_backward,
)

TOKENS, COLUMNS, SIZES, RANK = 40, 24, (16, 8), 4
ROWS, COUNT = sum(SIZES), 90


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    """x, b, a, values (leaves with gradients) and the support."""
    torch.manual_seed(0)
    shapes = ((TOKENS, COLUMNS), (ROWS, RANK), (len(SIZES) * RANK, COLUMNS), (COUNT,))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    support = torch.randperm(ROWS * COLUMNS)[:COUNT].sort().values.int()
    return [*tensors, support]


def _plain(x: Tensor, b: Tensor, a: Tensor, values: Tensor, support: Tensor, scale: float):
    """The same by autograd over dense matrices."""
    parts = zip(b.split(SIZES), a.split(RANK), strict=True)
    w = torch.cat([scale * (b_i @ a_i) for b_i, a_i in parts])
    s = torch.zeros_like(w).view(-1).index_put((support.long(),), values).view_as(w)
    return x @ (w + s).t()


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that a product that reads its output would show it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 5e-2)],
)
@pytest.mark.usefixtures("uninitialized_is_nan")
def test_output_and_gradients_equal_dense_autograd_in_float64(
    dtype: torch.dtype, tolerance: float, scale: float
) -> None:
    *leaves, support = _inputs(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = sparse_low_rank(*leaves, support, SIZES, scale)
    dy = torch.randn_like(y)
    expected = _plain(*exact, support, scale)
    found = (y, *torch.autograd.grad(y, leaves, dy))
    wanted = (expected, *torch.autograd.grad(expected, exact, dy.double()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_operators_keep_pytorchs_rules() -> None:
    """Schemas, shapes and strides of the fake tensors, registration of the gradient."""
    inputs = _inputs(torch.float32)
    dy = torch.randn(TOKENS, ROWS)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(sparse_low_rank, (*inputs, SIZES, 0.5), test_utils=tests)
    detached = [tensor.detach() for tensor in inputs]
    arguments = (dy, *detached, SIZES, 0.5)
    torch.library.opcheck(sparse_low_rank_backward, arguments, test_utils=tests)


def test_backward_forms_w_once_and_the_weight_gradient_once() -> None:
    """Counted inside the operator; the formula for the operator itself gives the same."""
    inputs = [tensor.detach() for tensor in _inputs(torch.float32)]
    dy = torch.randn(TOKENS, ROWS)
    product, factors = 2 * TOKENS * ROWS * COLUMNS, 2 * ROWS * COLUMNS * RANK
    with FlopCounterMode(display=False) as inside:
        gradients(dy, *inputs, SIZES, 0.5)
    assert inside.get_total_flops() == 2 * product + 3 * factors
    with FlopCounterMode(display=False) as outside:
        sparse_low_rank_backward(dy, *inputs, SIZES, 0.5)
    assert outside.get_total_flops() == inside.get_total_flops()
    with FlopCounterMode(display=False) as forward:
        sparse_low_rank(*inputs, SIZES, 0.5)
    assert forward.get_total_flops() == product + factors


def test_a_rank_without_entries_has_the_low_rank_product_alone() -> None:
    x, b, a, values, support = _inputs(torch.float64)
    empty = values[:0].detach().requires_grad_()
    y = sparse_low_rank(x, b, a, empty, support[:0], SIZES, 0.5)
    parts = zip(b.split(SIZES), a.split(RANK), strict=True)
    torch.testing.assert_close(y, x @ torch.cat([0.5 * b_i @ a_i for b_i, a_i in parts]).t())
    y.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0,)


def test_stacks_beyond_int32_positions_are_refused() -> None:
    b, a = torch.empty(2**16, 1, device="meta"), torch.empty(1, 2**15, device="meta")
    values = torch.empty(0, device="meta")
    with pytest.raises(ValueError, match="2147483648 entries"):
        dense_stack(b, a, values, values.int(), (2**16,), 1.0)
