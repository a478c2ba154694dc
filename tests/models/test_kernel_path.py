"""The path of the kernels through the decoder, with plain stand-ins for them, on the CPU.

What the layers hand to the operators (separate outputs, one tensor side by side, one batch) must
not change loss or gradients; the kernels themselves are tested in tests/kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import megalr.models.decoder
from megalr.kernels.attention import apply_rope, plain_attention
from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from tests.models.settings import factorized, full_rank, low_rank, tiny

HEAD_DIM = tiny(num_heads=4).head_dim
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "low_rank": (low_rank(), {"num_heads": 4, "num_kv_heads": 4}),
    "low_rank, grouped heads": (low_rank(), {"num_heads": 4, "num_kv_heads": 2}),
    "low_rank, biases": (
        low_rank(),
        {"num_heads": 4, "num_kv_heads": 4, "attention_bias": True, "output_bias": True},
    ),
    "low_rank, attention dense": (
        low_rank(targets=["gate", "up", "down"]),
        {"num_heads": 4, "num_kv_heads": 4},
    ),
    "cola": (factorized("cola"), {"num_heads": 4, "num_kv_heads": 4}),
    "lora": (factorized("lora"), {"num_heads": 4, "num_kv_heads": 4}),
    "full_rank": (full_rank(), {"num_heads": 4, "num_kv_heads": 4}),
}


def _three(projections: Any) -> Any:
    return projections[0].unbind() if len(projections) == 1 else projections


def _forward(projections: Any, rope: Any, head_dim: int) -> Any:
    y = plain_attention(*_three(projections), rope, None, head_dim)
    return y, y.new_empty(y.shape[0], y.shape[2] // head_dim, y.shape[1], dtype=torch.float32)


def _backward(do: Any, projections: Any, rope: Any, o: Any, lse: Any, head_dim: int) -> Any:
    """By hand: inside an operator autograd records nothing."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, H|K, S, D)

    q, k, v = map(heads, _three(projections))
    group, scale = q.shape[1] // k.shape[1], head_dim**-0.5
    q = apply_rope(q, rope)
    k, v = (x.repeat_interleave(group, 1) for x in (apply_rope(k, rope), v))
    later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    p = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
    dp = heads(do) @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    back = torch.stack((rope[0], -rope[1]))
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ heads(do)))
    grads = [apply_rope(ds @ k, back), apply_rope(dk, back), dv]
    grads = [x.transpose(1, 2).flatten(2) for x in grads]
    return [torch.stack(grads)] if len(projections) == 1 else grads


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The operators are used on the CPU; the number of tensors that attention is given."""
    found: list[int] = []
    monkeypatch.setattr(megalr.models.decoder, "applies", lambda *_: True)
    monkeypatch.setattr(megalr.models.decoder, "swiglu_applies", lambda _: True)

    def forward(projections: Any, rope: Any, head_dim: int) -> Any:
        found.append(len(projections))
        return _forward(projections, rope, head_dim)

    with torch.library._scoped_library("megalr", "IMPL") as library:
        library.impl("causal_attention", forward, "CPU")
        library.impl("causal_attention_backward", _backward, "CPU")
        yield found
    torch._dynamo.reset()


def _results(decoder: Decoder) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, decoder.config.vocab_size, (3, 11))
    labels = torch.randint(0, decoder.config.vocab_size, (3, 11))
    loss = decoder.summed_loss(ids, labels)
    loss.backward()
    grads = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_without_kernels(
    case: str, compiled: bool, seen: list[int]
) -> None:
    method, sizes = CASES[case]
    decoder = build_decoder(tiny(**sizes), method, seed=3)
    expected = _results(decoder)
    assert not seen
    decoder.use_kernels()
    if compiled:
        for block in decoder.blocks():
            block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    found = _results(decoder)
    together = case in ("low_rank", "cola")
    assert seen == [1 if together else 3] * decoder.config.num_layers
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
