"""The backend of torch that causal attention takes is a rule of shape, device and versions."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import megalr.kernels.attention as module
from megalr.kernels.attention import (
    FASTEST,
    Backend,
    attention_reference,
    causal_attention,
    causal_backend,
    fastest_backend,
)
from megalr.models.recompute import _policy
from megalr.models.rope import rope_tables

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("S", "D", "expected"),
    [
        (512, 64, "torch"),
        (1000, 64, "torch"),  # no multiple of 128
        (1024, 64, "first"),
        (8192, 64, "second"),
        (8320, 64, "second"),
        (32768, 128, "first"),
        (4096, 80, "torch"),
    ],
)
def test_the_longest_entry_that_a_length_reaches_counts(
    S: int, D: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {64: ((1024, "first"), (8192, "second")), 128: ((1024, "first"),)}
    monkeypatch.setattr(module, "FASTEST", table)
    assert fastest_backend(S, D) == expected


def test_the_table_is_in_order_and_starts_where_the_kernel_stops() -> None:
    for entries in FASTEST.values():
        starts = [start for start, _ in entries]
        assert starts == sorted(starts) and starts[0] > module.MAX_LENGTH


class _Tensor:
    """What the rule reads of a tensor on a GPU that is not here."""

    def __init__(self, S: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype, self.is_cuda = torch.Size((1, 2, S, 64)), dtype, True
        self.device = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU, cuDNN and torch for which the rule holds."""
    monkeypatch.setattr(module, "FASTEST", {64: ((1024, "cudnn"), (4096, "flash"))})
    monkeypatch.setattr(module, "_capable", lambda index: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    return monkeypatch


def test_half_precision_on_hopper_takes_the_table(hopper: pytest.MonkeyPatch) -> None:
    assert causal_backend(_Tensor(2048), False) == "cudnn"  # type: ignore[arg-type]
    assert causal_backend(_Tensor(2048, torch.float16), True) == "cudnn"  # type: ignore[arg-type]
    assert causal_backend(_Tensor(4096), True) == "flash"  # type: ignore[arg-type]
    assert causal_backend(_Tensor(512), False) == "torch"  # type: ignore[arg-type]
    assert causal_backend(_Tensor(2048, torch.float32), False) == "torch"  # type: ignore[arg-type]
    hopper.setattr(module, "_capable", lambda index: False)
    assert causal_backend(_Tensor(2048), False) == "torch"  # type: ignore[arg-type]


def test_what_is_too_old_or_turned_off_is_left_to_torch(hopper: pytest.MonkeyPatch) -> None:
    def chosen(S: int = 2048, grouped: bool = False) -> Backend:
        return causal_backend(_Tensor(S), grouped)  # type: ignore[arg-type]

    for owner, name, value in (
        (torch.backends.cudnn, "version", lambda: 90100),
        (torch.backends.cudnn, "version", lambda: None),
        (torch.backends.cuda, "cudnn_sdp_enabled", lambda: False),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value)
            assert chosen() == "torch", name
    assert chosen() == "cudnn"
    hopper.setattr(torch, "__version__", "2.7.1")
    assert chosen() == "cudnn" and chosen(grouped=True) == "torch"
    assert chosen(4096) == "flash"
    hopper.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert chosen(4096) == "torch"


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
def test_torch_by_itself_equals_math(K: int) -> None:
    """On a CPU, where the rule leaves the choice to torch."""
    D = 64
    *qkv, do = inputs = _inputs(2, 1024, 4, K, D, "cpu")
    assert causal_backend(qkv[0].unflatten(-1, (-1, D)).transpose(1, 2), K != 4) == "torch"
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
@pytest.mark.parametrize("backend", ["cudnn", "flash", None])
def test_backends_equal_math(backend: Backend | None, D: int, K: int, compiled: bool) -> None:
    """In bfloat16 on a GPU; None: what the rule takes."""
    S = 1024
    inputs = [x.bfloat16() for x in _inputs(2, S, 4, K, D, "cuda")]
    qkv = [x.detach().requires_grad_() for x in inputs[:3]]
    rope = rope_tables(S, D, 10000.0, torch.device("cuda"))

    def work(*qkv: torch.Tensor) -> torch.Tensor:
        return attention_reference(*qkv, rope, None, D, backend)

    o = (torch.compile(work, fullgraph=True, dynamic=False) if compiled else work)(*qkv)
    results = (o.detach(), *torch.autograd.grad(o, qkv, inputs[3]))
    for result, expected in zip(results, _math(inputs, D), strict=True):
        assert (result.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
@pytest.mark.parametrize("K", [4, 2])
def test_operators_trace_with_layout_and_flops_of_sdpa(backend: Backend, K: int) -> None:
    """On meta tensors: o lies in memory as q does, so that no copy follows; FLOPs as counted."""
    q = torch.empty(2, 1024, 4, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    k = torch.empty(2, 1024, K, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    with FlopCounterMode(display=False) as counter:
        o = causal_attention(q, k, k, backend)
    assert o.shape == q.shape and o.stride() == q.stride()
    assert counter.get_total_flops() == 2 * 2 * 2 * 1024 * 1024 * 4 * 64


@pytest.mark.parametrize("level", ["elementwise", "mlp", "bottleneck"])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_recomputation_knows_the_operators(name: str, level: str) -> None:
    """They are kept where attention is kept (models.recompute)."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    kept = _policy(level, (4, 4, 4), None, operator).name == "MUST_SAVE"
    assert kept == (level != "bottleneck")
