"""Attention above the kernels' length is torch's: exact, with rotations, by whichever backend."""

from __future__ import annotations

import pytest
import torch

from megalr.kernels.attention import attention_reference
from megalr.models.recompute import _policy
from megalr.models.rope import rope_tables

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _inputs(B: int, S: int, H: int, K: int, D: int, device: str) -> list[torch.Tensor]:
    """q, k, v and do, float32."""
    generator = torch.Generator().manual_seed(0)
    widths = (H * D, K * D, K * D, H * D)
    return [torch.randn(B, S, w, generator=generator).to(device) for w in widths]


def _math(inputs: list[torch.Tensor], D: int) -> tuple[torch.Tensor, ...]:
    """o, dq, dk, dv of causal attention with RoPE in float64, written out."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    S = q.shape[1]
    cos, sin = rope_tables(S, D, 10000.0, q.device).double()

    def heads(x: torch.Tensor, turn: bool) -> torch.Tensor:
        x = x.unflatten(-1, (-1, D)).transpose(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin if turn else x

    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 1) for x in (heads(k, True), heads(v, False)))
    scores = heads(q, True) @ keys.mT / D**0.5
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    o = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(1, 2).flatten(2)
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), inputs[3].double()))


@pytest.mark.parametrize("K", [4, 2])
def test_long_attention_equals_math(K: int) -> None:
    D = 64
    *qkv, do = inputs = _inputs(2, 1024, 4, K, D, "cpu")
    qkv = [x.requires_grad_() for x in qkv]
    rope = rope_tables(1024, D, 10000.0, torch.device("cpu"))
    o = attention_reference(*qkv, rope, None, D)
    results = (o.detach(), *torch.autograd.grad(o, qkv, do))
    for result, expected in zip(results, _math(inputs, D), strict=True):
        assert (result.double() - expected).norm() / expected.norm() < 1e-5


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("D", [64, 128])
def test_long_attention_of_a_gpu_equals_math(D: int, K: int, compiled: bool) -> None:
    """In bfloat16."""
    S = 1024
    inputs = [x.bfloat16() for x in _inputs(2, S, 4, K, D, "cuda")]
    qkv = [x.detach().requires_grad_() for x in inputs[:3]]
    rope = rope_tables(S, D, 10000.0, torch.device("cuda"))

    def work(*qkv: torch.Tensor) -> torch.Tensor:
        return attention_reference(*qkv, rope, None, D)

    o = (torch.compile(work, fullgraph=True, dynamic=False) if compiled else work)(*qkv)
    results = (o.detach(), *torch.autograd.grad(o, qkv, inputs[3]))
    for result, expected in zip(results, _math(inputs, D), strict=True):
        assert (result.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("level", ["elementwise", "mlp", "bottleneck"])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_recomputation_knows_the_operators(name: str, level: str) -> None:
    """They are kept where attention is kept (models.recompute)."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    kept = _policy(level, (4, 4, 4), None, operator).name == "MUST_SAVE"
    assert kept == (level != "bottleneck")
