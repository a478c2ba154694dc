"""Newton-Schulz orthogonalization against DeepSpeed's Muon and against the singular values."""

from __future__ import annotations

import pytest
import torch

from megalr.optim.muon import muon_update, orthogonalized

SHAPES = [(8, 5), (5, 8), (6, 6), (48, 160), (160, 48), (1, 7), (7, 1), (130, 129)]


@pytest.mark.parametrize("method", ["gram", "standard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_and_momentum_are_bitwise_those_of_deepspeed(shape, dtype, method):
    from deepspeed.runtime.zero.muon import original_muon

    torch.manual_seed(0)
    ours, theirs = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    for update in range(4):
        grad = torch.randn(shape).to(dtype) * 10.0 ** (3 * update - 3)
        if update == 2:
            grad[0, 0] = float("inf")
        with torch.compiler.set_stance("force_eager"):
            want = original_muon.muon_update(grad.clone(), theirs, beta=0.9, ns_method=method)
        found = muon_update(grad.clone(), ours, 0.9, method)
        assert found.dtype == dtype and torch.equal(ours, theirs)
        assert torch.equal(found.nan_to_num(), want.nan_to_num()), update
        assert bool(found.isfinite().all()) == (update != 2)


@pytest.mark.parametrize("method", ["gram", "standard"])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_singular_vectors_are_kept_and_values_become_about_one(shape, method):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    found = orthogonalized(matrix, method).float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.mT @ found @ right.mT
    values = inside.diagonal()
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 0.05
