"""Attention with rotation inside equals its reference (on the CPU by Triton's interpreter)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalr.errors import UserError
from megalr.kernels import HAS_TRITON
from megalr.kernels.attention import (
    attention,
    attention_applies,
    attention_reference,
)
from megalr.models.rope import rope_tables
from tests.kernels.where import DEVICE, HALF, INTERPRETED, needs_triton

if HAS_TRITON:
    from megalr.kernels.attention_backward_triton import BackwardConfig, launch_backward
    from megalr.kernels.attention_triton import ForwardConfig, launch_forward


def _inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, strided: bool = False
) -> list[torch.Tensor]:
    """q, k, v and do of random numbers for B, S, H, K, D; strided: q, k, v parts of one tensor."""
    B, S, H, K, D = shape
    generator = torch.Generator().manual_seed(0)
    widths = [H * D, K * D, K * D]
    if strided:
        wide = torch.randn(B, S, sum(widths) + 8, generator=generator).to(DEVICE, dtype)
        parts = list(wide.split([*widths, 8], dim=-1)[:3])
    else:
        parts = [torch.randn(B, S, w, generator=generator).to(DEVICE, dtype) for w in widths]
    return [*parts, torch.randn(B, S, H * D, generator=generator).to(DEVICE, dtype)]


def _reference(
    inputs: list[torch.Tensor], rope: torch.Tensor | None, D: int
) -> tuple[torch.Tensor, ...]:
    """o, dq, dk, dv by plain attention in float64, rotation included."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])

    def rotated(x: torch.Tensor) -> torch.Tensor:
        assert rope is not None
        x = x.unflatten(-1, (-1, D))
        first, second = x.chunk(2, dim=-1)
        cos, sin = rope.double()[:, :, None]  # (S, 1, D) each
        return (x * cos + torch.cat((-second, first), -1) * sin).flatten(2)

    pair = (q, k) if rope is None else (rotated(q), rotated(k))
    o = attention_reference(*pair, v, None, None, D)
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), inputs[3].double()))


def _rope(S: int, D: int) -> torch.Tensor:
    return rope_tables(S, D, 10000.0, torch.device(DEVICE))


CASES = {
    # B, S, H, K, D; blocks of the forward pass; of the backward pass, programs
    "blocks_of_one_size": (
        (2, 64, 2, 2, 32),
        (32, 32),
        (32, 32, 3),
    ),
    "wide_blocks_of_keys": (
        (1, 70, 2, 2, 64),
        (16, 32),
        (16, 32, 1),
    ),
    "wide_blocks_of_queries": (
        (1, 50, 1, 1, 64),
        (32, 16),
        (16, 16, 1),
    ),
    "one_block": ((2, 21, 1, 1, 32), (32, 32), (32, 32, 1)),
    "one_token": ((1, 1, 2, 1, 32), (16, 16), (16, 16, 1)),
    "grouped_heads": (
        (1, 40, 4, 2, 32),
        (16, 16),
        (16, 32, 3),
    ),
    "no_rotation": (
        (1, 40, 2, 1, 32),
        (16, 16),
        (16, 16, 1),
    ),
}


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_kernels_equal_float64(case: str, dtype: torch.dtype) -> None:
    """o, dq, dk, dv for full and ragged blocks, programs with several tasks, grouped heads."""
    if dtype == torch.float32 and not INTERPRETED:
        pytest.skip("on a GPU the products of float32 are rounded to TF32")
    shape, forward, backward = CASES[case]
    S, D = shape[1], shape[4]
    *qkv, do = inputs = _inputs(shape, dtype, strided=case == "grouped_heads")
    rope = _rope(S, D) if case not in ("one_block", "no_rotation") else None
    queries, keys, programs = backward
    o, lse = launch_forward(*qkv, rope, D, ForwardConfig(*forward, 4, 1))
    config = BackwardConfig(queries, keys, 4, 1, programs)
    results = (o, *launch_backward(do, *qkv, rope, o, lse, D, config))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for name, result, expected in zip(
        ("o", "dq", "dk", "dv"), results, _reference(inputs, rope, D), strict=True
    ):
        assert result.dtype == dtype and result.is_contiguous()
        error = (result.double() - expected).norm() / expected.norm().clamp(min=1)
        assert error < tolerance, f"{name}: {error:.1e}"


@needs_triton
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_operator_is_differentiable_and_compiles(compiled: bool, together: bool) -> None:
    """Autograd of the operator, eager and in one graph; do of a broadcast, of stride 0."""
    B, S, H, _, D = shape = (1, 17, 2, 2 if together else 1, 32)
    q, k, v = _inputs(shape, HALF)[:3]
    projections = [torch.stack((q, k, v))] if together else [q, k, v]
    projections = [x.requires_grad_() for x in projections]
    rope = _rope(S, D)

    def work(*projections: torch.Tensor) -> torch.Tensor:
        return attention(projections, rope, D)

    if compiled:
        work = torch.compile(work, fullgraph=True, backend="aot_eager")
    o = work(*projections)
    o.sum().backward()
    ones = torch.ones(B, S, H * D, device=DEVICE)
    expected = _reference([q, k, v, ones], rope, D)
    grads = [x.grad for x in projections]
    parts = grads[0].unbind() if together and grads[0] is not None else grads
    for result, value in zip((o, *parts), expected, strict=True):
        assert result is not None
        assert (result.double() - value).norm() / value.norm() < 1e-2


@needs_triton
def test_operator_passes_the_checks_of_torch() -> None:
    """Schema, shapes of the fake operator, and autograd's registration."""
    q, k, v, _ = _inputs((1, 5, 2, 1, 32), HALF)
    for x in (q, k, v):
        x.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = ([q, k, v], _rope(5, 32), 32, None)
    torch.library.opcheck(torch.ops.megalr.causal_attention.default, arguments, test_utils=checks)


def test_fake_operator_gives_shapes_without_triton() -> None:
    """As torch.compile traces it: shapes and dtypes of all results, here on meta tensors."""
    q = torch.empty(2, 7, 4 * 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 7, 2 * 64, dtype=torch.bfloat16, device="meta")
    o, lse = torch.ops.megalr.causal_attention([q, k, k], None, 64, None)
    assert o.shape == q.shape and o.dtype == q.dtype
    assert lse.shape == (2, 4, 7) and lse.dtype == torch.float32
    grads = torch.ops.megalr.causal_attention_backward(o, [q, k, k], None, o, lse, 64, None)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    qkv = torch.empty(3, *q.shape, dtype=q.dtype, device="meta")
    o, lse = torch.ops.megalr.causal_attention([qkv], None, 64, None)
    assert o.shape == q.shape and lse.shape == (2, 4, 7)
    (grad,) = torch.ops.megalr.causal_attention_backward(o, [qkv], None, o, lse, 64, None)
    assert grad.shape == qkv.shape


def test_refuses_what_does_not_fit() -> None:
    """Before anything is launched."""
    q, k, v, _ = _inputs((1, 4, 2, 2, 32), torch.bfloat16)
    with pytest.raises(UserError, match="head width 16"):
        attention((q, k, v), None, 16)
    with pytest.raises(UserError, match="do not fit"):
        attention((q, k, v.float()), None, 32)
    with pytest.raises(UserError, match="tables"):
        attention((q, k, v), _rope(5, 32), 32)


@pytest.mark.parametrize("level", ["forward", "backward"])
def test_counts_the_work_of_sdpa(level: str) -> None:
    """FLOPs seen by torch's counter: those of attention by sdpa, masked scores included."""
    q, k, v = (torch.empty(2, 8, 4 * 32, device="meta", requires_grad=True) for _ in range(3))
    counts = []
    for function in (
        lambda: attention_reference(q, k, v, None, None, 32),
        lambda: attention((q, k, v), None, 32),
    ):
        with FlopCounterMode(display=False) as counter:
            o = function()
            if level == "backward":
                o.sum().backward()
        counts.append(counter.get_total_flops())
    forward = 4 * 2 * 8 * 8 * 4 * 32
    # Plain attention on meta tensors keeps its scores: two products forward, four backward.
    assert counts == ([forward, forward] if level == "forward" else [3 * forward, 3.5 * forward])


def test_cpu_float32_and_masks_take_the_plain_path() -> None:
    """The kernels are for half precision on a GPU, without a mask."""
    assert not attention_applies(torch.empty(1, 4, 64, dtype=torch.bfloat16), None, 32)
    if torch.cuda.is_available():
        q = torch.empty(1, 4, 64, device="cuda")
        assert not attention_applies(q, None, 32)
        assert not attention_applies(
            q.bfloat16(), torch.ones(4, 4, dtype=torch.bool, device="cuda"), 32
        )
