"""The gradient of embeddings equals torch's (the kernel by Triton's interpreter)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalr.kernels.embedding import lookup, summed_rows
from tests.kernels.where import DEVICE, HALF, needs_triton


def test_lookup_is_torch_s() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ids = torch.randint(0, 9, (3, 7), device=DEVICE)
    upstream = torch.randn(3, 7, 5, dtype=torch.float64, device=DEVICE)
    found, expected = lookup(ids, weight), F.embedding(ids, weight)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(y, weight, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    """Of 512 ones a sum in bf16 would stop at 256."""
    ids = torch.ones(512, dtype=torch.int64, device=DEVICE)
    dy = torch.ones(512, 3, dtype=torch.bfloat16, device=DEVICE)
    found = summed_rows(ids, dy, 4)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[0.0] * 3, [512.0] * 3, [0.0] * 3, [0.0] * 3]


@needs_triton
@pytest.mark.parametrize("rows", [50, 40_000])
@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
@pytest.mark.parametrize("tokens", [0, 1, 90, 64 * 64])
def test_kernels_equal_float64(rows: int, kind: torch.dtype, tokens: int) -> None:
    """Runs inside a chunk, over a border, over more chunks than are summed together; wide rows."""
    from megalr.kernels.embedding_triton import CHUNK, CHUNKS, COLUMNS, sums

    if rows > torch.iinfo(kind).max:
        pytest.skip("such ids need 32 bits")
    torch.manual_seed(0)
    width = COLUMNS + 3
    often = torch.full((CHUNK * (CHUNKS + 3) if tokens > CHUNK * CHUNKS else tokens // 2,), 7)
    ids = torch.cat((often, torch.randint(0, rows, (tokens - often.numel(),))))
    ids = ids[torch.randperm(tokens)].to(DEVICE)
    dy = torch.randn(tokens, width, device=DEVICE).to(HALF)
    keys, order = torch.sort(ids.to(kind), stable=True)
    found = sums(keys, order, dy, rows)
    exact = torch.zeros(rows, width, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, ids, dy.double())
    # the interpreter truncates where a GPU rounds to nearest
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=1e-4)
    assert torch.equal(found, sums(keys, order, dy, rows))


@needs_triton
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64])
def test_runs_of_one_length(length: int) -> None:
    """Every border between runs relative to those between chunks; the last chunk is not full."""
    from megalr.kernels.embedding_triton import sums

    torch.manual_seed(0)
    keys = torch.arange(300, device=DEVICE) // length
    rows = int(keys[-1]) + 2
    dy = torch.randn(300, 5, device=DEVICE)
    found = sums(keys.short(), torch.arange(300, device=DEVICE), dy, rows)
    exact = torch.zeros(rows, 5, device=DEVICE).index_add_(0, keys, dy)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
