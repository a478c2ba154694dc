"""Forms of a document mask: against masks written out, torch's own builder, and float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from megalr.errors import UserError
from megalr.kernels import HAS_TRITON
from megalr.kernels.attention import (
    attention,
    attention_applies,
    attention_reference,
)
from megalr.kernels.document_mask import block_mask, document_bounds, is_bounds, visible
from megalr.models.rope import rope_tables
from tests.kernels.where import DEVICE, HALF, INTERPRETED, needs_triton

if HAS_TRITON:
    from megalr.kernels.attention_backward_triton import BackwardConfig, launch_backward
    from megalr.kernels.attention_triton import ForwardConfig, launch_forward


def _positions(B: int, S: int, share: float) -> torch.Tensor:
    """Documents that start at a random ``share`` of the places."""
    starts = torch.rand(B, S, generator=torch.Generator().manual_seed(S)) < share
    starts[:, 0] = True
    place = torch.arange(S)
    return (place - torch.where(starts, place, 0).cummax(1).values).int().to(DEVICE)


def test_bounds_written_out() -> None:
    """Documents of 3, 1 and 4 tokens, whole and in a window of 2."""
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]], dtype=torch.int32)
    bounds = document_bounds(positions)
    assert bounds.dtype == torch.int32 and is_bounds(bounds)
    assert bounds.tolist() == [
        positions.tolist(),
        [[0, 0, 0, 3, 4, 4, 4, 4]],
        [[3, 3, 3, 4, 8, 8, 8, 8]],
    ]
    assert document_bounds(positions, 2)[1:].tolist() == [
        [[0, 0, 1, 3, 4, 4, 5, 6]],
        [[2, 3, 3, 4, 6, 7, 8, 8]],
    ]
    seen = [[0], [0, 1], [1, 2], [3], [4], [4, 5], [5, 6], [6, 7]]
    mask = visible(document_bounds(positions, 2))
    assert mask.shape == (1, 1, 8, 8) and not is_bounds(mask)
    assert [torch.nonzero(row).flatten().tolist() for row in mask[0, 0]] == seen


@pytest.mark.parametrize("window", [None, 1, 100, 128, 200])
@pytest.mark.parametrize("S", [100, 128, 300, 1024])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(
    S: int, window: int | None
) -> None:
    for share in (0.001, 0.01, 0.1, 1.0):
        bounds = document_bounds(_positions(3, S, share).cpu(), window)
        ours = block_mask(bounds)
        place = torch.arange(S)
        rows = torch.arange(3)[:, None, None]
        pairs = ours.mask_mod(rows, rows, place[:, None], place[None])
        assert torch.equal(pairs, visible(bounds)[:, 0])
        expected = create_block_mask(ours.mask_mod, 3, None, S, S, device="cpu")
        for kind in ("kv", "full_kv", "q", "full_q"):
            count = getattr(expected, f"{kind}_num_blocks")
            assert torch.equal(getattr(ours, f"{kind}_num_blocks"), count)
            lists = [getattr(mask, f"{kind}_indices") for mask in (ours, expected)]
            used = torch.arange(lists[0].shape[-1]) < count[..., None]
            assert torch.equal(*(used * indices for indices in lists))


def _reference(
    inputs: list[torch.Tensor], rope: torch.Tensor | None, bounds: torch.Tensor, D: int
) -> tuple[torch.Tensor, ...]:
    """o, dq, dk, dv in float64, rotated by the positions and with the mask of every pair."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])

    def rotated(x: torch.Tensor) -> torch.Tensor:
        if rope is None:
            return x
        cos, sin = rope.double()[:, bounds[0].long(), None]  # (B, S, 1, D) each
        x = x.unflatten(-1, (-1, D))
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-second, first), -1) * sin).flatten(2)

    o = attention_reference(rotated(q), rotated(k), v, None, visible(bounds), D)
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), inputs[3].double()))


CASES = {
    # B, S, H, K; blocks of the forward and of the backward pass; window
    "blocks_of_one_size": ((2, 64, 2, 2), (32, 32), (32, 32), None),
    "wide_blocks_of_keys": ((1, 70, 2, 2), (16, 32), (16, 32), None),
    "wide_blocks_of_queries": ((1, 50, 1, 1), (32, 16), (16, 16), None),
    "one_block": ((2, 21, 1, 1), (32, 32), (32, 32), None),
    "grouped_heads": ((1, 40, 4, 2), (16, 16), (16, 32), None),
    "no_rotation": ((1, 40, 2, 1), (16, 16), (16, 16), None),
    "sliding_window": ((2, 70, 1, 1), (16, 16), (16, 16), 20),
}


@needs_triton
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_kernels_equal_float64(case: str, share: float, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and not INTERPRETED:
        pytest.skip("on a GPU the products of float32 are rounded to TF32")
    (B, S, H, K), forward, backward, window = CASES[case]
    D = 32
    bounds = document_bounds(_positions(B, S, share), window)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(B, S, heads * D, generator=generator).to(DEVICE, dtype)
        for heads in (H, K, K, H)
    ]
    *qkv, do = inputs
    rope = rope_tables(S, D, 10000.0, torch.device(DEVICE)) if case != "no_rotation" else None
    o, lse = launch_forward(*qkv, rope, D, ForwardConfig(*forward, 4, 1), bounds)
    config = BackwardConfig(*backward, 4, 1, 3)
    results = (o, *launch_backward(do, *qkv, rope, o, lse, D, config, documents=bounds))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for name, result, expected in zip(
        ("o", "dq", "dk", "dv"), results, _reference(inputs, rope, bounds, D), strict=True
    ):
        # With documents of one token dq and dk are 0.
        error = (result.double() - expected).norm() / (expected.norm() + 1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


@needs_triton
def test_the_operator_passes_the_bounds_to_both_passes() -> None:
    bounds = document_bounds(_positions(1, 17, 0.2))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 17, 64, generator=generator).to(DEVICE, HALF) for _ in range(4)]
    projections = [x.clone().requires_grad_() for x in inputs[:3]]
    rope = rope_tables(17, 32, 10000.0, torch.device(DEVICE))
    o = attention(projections, rope, 32, bounds)
    o.backward(inputs[3])
    results = (o, *(x.grad for x in projections))
    for result, expected in zip(results, _reference(inputs, rope, bounds, 32), strict=True):
        assert result is not None
        assert (result.double() - expected).norm() / expected.norm() < 1e-2
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (projections, rope, 32, bounds)
    torch.library.opcheck(torch.ops.megalr.causal_attention.default, arguments, test_utils=checks)


def test_bounds_of_another_shape_are_refused() -> None:
    q = torch.empty(2, 8, 64, dtype=torch.bfloat16)
    bounds = document_bounds(_positions(2, 7, 0.2).cpu())
    with pytest.raises(UserError, match=r"documents \(3, 2, 7\) torch.int32, need \(3, 2, 8\)"):
        attention((q, q, q), None, 32, bounds)
    assert not attention_applies(q, visible(bounds), 32)
