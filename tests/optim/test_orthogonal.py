"""Newton-Schulz orthogonalization against float64 singular values, and Muon against DeepSpeed's."""

from __future__ import annotations

import math

import pytest
import torch

from megalr.optim import Muon, muon
from megalr.optim.muon import COEFFICIENTS, STEPS, orthogonalized

SHAPES = [(8, 5), (5, 8), (6, 6), (48, 160), (160, 48), (1, 7), (7, 1), (130, 129)]
FORMS = [("gram", torch.float16), ("gram", torch.float32), ("standard", torch.bfloat16)]
"""Forms of the iteration and their dtypes. Which of the two dtypes gram has depends on the CPU; the
tests set it, and so prove both on every CPU."""
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def in_dtype(monkeypatch, method, dtype):
    """Lets the Gram form, ours and DeepSpeed's, iterate in a dtype."""
    from deepspeed.runtime.zero.muon import original_muon

    if method == "gram":
        monkeypatch.setattr(muon, "_gram_dtype", lambda device: dtype)
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method: dtype)


def rounding_bound(dtype, shape):
    """Of the relative error of the iteration: 40 roundings of a product.

    Products of 16-bit numbers are summed in float32 and rounded once. In float32 each of the k
    additions of a sum rounds too, which makes sqrt(k) of it where the roundings are independent.
    """
    return 40 * ROUNDING[dtype] * (math.sqrt(max(shape)) if dtype == torch.float32 else 1)


def exact(matrices):
    """The quintic, five times, on the singular values of float64 matrices M / (|M|_F + 1e-7)."""
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / (values.square().sum(dim=-1, keepdim=True).sqrt() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    return (left * values[..., None, :]) @ right


def distance(found, wanted):
    """Largest relative error of a batch of matrices, in Frobenius norm."""
    error = (found.double() - wanted).square().sum(dim=(-2, -1))
    return float((error / wanted.square().sum(dim=(-2, -1))).sqrt().max())


@pytest.mark.parametrize("method, iterated", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_the_polynomial_of_the_singular_values_to_rounding(
    shape, method, iterated, monkeypatch
):
    in_dtype(monkeypatch, method, iterated)
    torch.manual_seed(0)
    matrices = torch.randn(5, *shape) * 10.0 ** torch.arange(-2, 8, 2)[:, None, None]
    found = orthogonalized(matrices, method)
    assert found.dtype == iterated
    bound = rounding_bound(iterated, shape)
    assert distance(found, exact(matrices)) < bound
    alone = torch.cat([orthogonalized(matrix[None], method) for matrix in matrices])
    assert distance(found, alone.double()) < bound


@pytest.mark.parametrize("method, iterated", FORMS)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_singular_vectors_are_kept_and_values_become_about_one(
    shape, method, iterated, monkeypatch
):
    in_dtype(monkeypatch, method, iterated)
    torch.manual_seed(1)
    matrix = torch.randn(1, *shape)
    found = orthogonalized(matrix, method).float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = (left.mT @ found @ right.mT)[0]
    values = inside.diagonal()
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 0.05


@pytest.mark.parametrize("method, iterated", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_is_bitwise_that_of_deepspeed_and_updates_differ_by_rounding(
    shape, dtype, method, iterated, monkeypatch
):
    from deepspeed.runtime.zero.muon import original_muon

    in_dtype(monkeypatch, method, iterated)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    weight.row_blocks = (("w", 0, shape[0]),)
    optimizer = Muon(
        [weight], lr=1.0, use_muon=True, momentum=0.9, ns_method=method, state_dtype=dtype
    )  # fmt: skip
    theirs = torch.zeros(shape, dtype=dtype)
    bound = 2 * rounding_bound(iterated, shape) + 2 * ROUNDING.get(dtype, 0)
    for update in range(4):
        grad = torch.randn(shape).to(dtype) * 10.0 ** (3 * update - 3)
        if update == 2:
            grad[0, 0] = float("inf")
        with torch.compiler.set_stance("force_eager"):
            want = original_muon.muon_update(grad.clone(), theirs, beta=0.9, ns_method=method)
        weight.data.zero_()
        weight.grad = grad
        optimizer.step()
        ours = optimizer.state[weight]["matrices"]["w"]["momentum_buffer"]
        assert ours.dtype == dtype and torch.equal(ours, theirs)
        assert bool(weight.isfinite().all()) == bool(want.isfinite().all()) == (update != 2)
        if update != 2:
            assert distance(-weight.detach(), want.double()) < bound, update


def test_a_gradient_that_is_not_finite_concerns_its_own_matrix_only():
    torch.manual_seed(2)
    apart = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in range(3)]
    stacked = torch.nn.Parameter(torch.zeros(18, 4))
    stacked.row_blocks = tuple((f"m{i}", 6 * i, 6 * i + 6) for i in range(3))
    one, two = Muon(apart, use_muon=True), Muon([stacked], use_muon=True)
    for update in range(3):
        grad = torch.randn(18, 4)
        if update == 1:
            grad[7, 2] = float("nan")
        stacked.grad = grad.clone()
        for p, part in zip(apart, grad.split(6), strict=True):
            p.grad = part.clone()
        one.step()
        two.step()
    whole = torch.cat(apart)
    assert torch.allclose(stacked, whole, atol=1e-6, equal_nan=True)
    assert whole[6:12].isnan().all() and whole[:6].isfinite().all() and whole[12:].isfinite().all()
    kept = two.state[stacked]["matrices"]["m1"]["momentum_buffer"]
    assert kept.isfinite().all()
