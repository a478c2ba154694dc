"""The grouped products with B equal plain torch, in value, gradients and as an operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalr.layers.up_projection import (
    MANY_ROWS,
    NO_OFFSETS,
    NO_RUNS,
    up_project,
    up_project_backward,
)

SIZES = [6, 10, 6]
RANK = 4


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    h = torch.randn(2, 5, len(SIZES) * RANK, dtype=dtype, requires_grad=True)
    return h, torch.randn(sum(SIZES), RANK, dtype=dtype, requires_grad=True)


def _plain(h: torch.Tensor, b: torch.Tensor, scale: float) -> list[torch.Tensor]:
    parts = zip(h.split(RANK, dim=-1), b.split(SIZES), strict=True)
    return [scale * F.linear(h_i, b_i) for h_i, b_i in parts]


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_values_and_gradients_in_float64(scale: float) -> None:
    """One output without a use gives no gradient to its B."""
    h, b = _inputs(torch.float64)
    weights = [torch.randn(2, 5, size, dtype=torch.float64) for size in SIZES]
    results = []
    for outputs in (
        up_project(h, b, SIZES, scale, False, NO_RUNS, NO_OFFSETS),
        _plain(h, b, scale),
    ):
        loss = (outputs[0] * weights[0]).sum() + (outputs[2] * weights[2]).sum()
        results.append((list(outputs), torch.autograd.grad(loss, (h, b))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert not results[0][1][1][SIZES[0] : SIZES[0] + SIZES[1]].any()


def test_scale_is_applied_before_rounding() -> None:
    """In bf16 a scaled copy of B would be rounded a second time."""
    h, b = _inputs(torch.bfloat16)
    scale = 1 / 3
    exact = _plain(h.detach().double(), b.detach().double(), scale)
    for y, expected in zip(
        up_project(h, b, SIZES, scale, False, NO_RUNS, NO_OFFSETS), exact, strict=True
    ):
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-10)


def test_operator_is_registered_as_compilation_needs_it() -> None:
    """Shapes without data, no aliases, gradients under AOT autograd."""
    h, b = _inputs(torch.float32)
    options = (SIZES, 0.5, False, NO_RUNS, NO_OFFSETS)
    torch.library.opcheck(up_project, (h, b, *options))
    grads = [torch.randn_like(y) for y in up_project(h.detach(), b.detach(), *options)]
    torch.library.opcheck(up_project_backward, (grads, h.detach(), b.detach(), *options))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("rows", [6, MANY_ROWS])
def test_stacked_in_float64(rows: int, scale: float, compiled: bool) -> None:
    """One tensor of all outputs, whose gradient is one tensor too."""
    torch.manual_seed(0)
    sizes = [rows, rows, rows]
    h = torch.randn(2, 5, 3 * RANK, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3 * rows, RANK, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, 5, rows, dtype=torch.float64)
    work = (
        torch.compile(up_project, backend="aot_eager", fullgraph=True) if compiled else up_project
    )
    (y,) = work(h, b, sizes, scale, True, NO_RUNS, NO_OFFSETS)
    parts = zip(h.split(RANK, dim=-1), b.split(sizes), strict=True)
    expected = torch.stack([scale * F.linear(h_i, b_i) for h_i, b_i in parts])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((y * weights).sum(), (h, b))
    wanted = torch.autograd.grad((expected * weights).sum(), (h, b))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_stacked_is_registered_as_compilation_needs_it() -> None:
    h = torch.randn(2, 5, 3 * RANK, requires_grad=True)
    b = torch.randn(18, RANK, requires_grad=True)
    torch.library.opcheck(up_project, (h, b, [6, 6, 6], 0.5, True, NO_RUNS, NO_OFFSETS))


def test_compiles_into_one_graph() -> None:
    h, b = _inputs(torch.float32)
    compiled = torch.compile(up_project, backend="aot_eager", fullgraph=True)
    for y, expected in zip(
        compiled(h, b, SIZES, 0.5, False, NO_RUNS, NO_OFFSETS),
        up_project(h, b, SIZES, 0.5, False, NO_RUNS, NO_OFFSETS),
        strict=True,
    ):
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


RUNS = [2, 0, 6, 3, 0, 10, 2, 3, 2]
"""Copies, first row and rows used: of the last matrix a rank holds rows 3 and 4, and padding."""
OFFSETS = [0.5, -0.25, 2.0]


def _offsets() -> torch.Tensor:
    """E of every matrix by the formula E[o, o // K] = value."""
    parts = []
    for index, size in enumerate(SIZES):
        copies, first, used = RUNS[3 * index : 3 * index + 3]
        part = torch.zeros(size, RANK, dtype=torch.float64)
        for row in range(used):
            part[row, (first + row) // copies] = OFFSETS[index]
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_fixed_offsets_of_the_factors_in_float64(scale: float) -> None:
    h, b = _inputs(torch.float64)
    weights = [torch.randn(2, 5, size, dtype=torch.float64) for size in SIZES]
    before = b.detach().clone()
    results = []
    for outputs in (
        up_project(h, b, SIZES, scale, False, RUNS, OFFSETS),
        _plain(h, b + _offsets(), scale),
    ):
        loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        results.append((list(outputs), torch.autograd.grad(loss, (h, b))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(b, before)
    torch.library.opcheck(up_project, (h, b, SIZES, scale, False, RUNS, OFFSETS))


def test_no_copy_of_a_factor_is_kept_for_the_backward_pass() -> None:
    h, b = _inputs(torch.float64)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        up_project(h, b, SIZES, 1.0, False, RUNS, OFFSETS)
    assert set(saved) == {h.data_ptr(), b.data_ptr()}
