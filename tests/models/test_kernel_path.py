"""The path of the kernels through the decoder, with PyTorch stand-ins for them, on the CPU.

The form of the operators' inputs (separate tensors, one tensor side by side, one batch) must not
change loss or gradients; the kernels themselves are tested in tests/kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megalr.config.model import RopeScaling
from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from tests.models.settings import factorized, full_rank, low_rank, tiny
from tests.models.stand_ins import kernels_on_the_cpu

FOUR = {"num_heads": 4, "num_kv_heads": 4}
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
    "norms of heads": (low_rank(), {**FOUR, "qk_norm": "head", "head_dim": 16}),
    "norms over all heads, post": (low_rank(), {**FOUR, "qk_norm": "full", "norm_order": "post"}),
    "no positions in a layer": (low_rank(), {**FOUR, "rope_layers": (True, False)}),
    "a window in a layer": (
        low_rank(),
        {**FOUR, "sliding_window": 5, "window_layers": (True, False)},
    ),
    "yarn": (
        low_rank(),
        {**FOUR, "rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_positions=16)},
    ),
    "partly rotated": (low_rank(), {**FOUR, "partial_rotary_factor": 0.5}),
}
TOGETHER = ("low_rank", "cola", "no positions in a layer", "a window in a layer", "yarn")
"""Cases in which the operator takes q, k, v as one tensor."""
CALLS = {"a window in a layer": 1, "partly rotated": 0}
"""Layers that use the operator, of two."""


@pytest.fixture
def seen() -> Iterator[list[int]]:
    with kernels_on_the_cpu() as found:
        yield found


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
    assert seen == [1 if case in TOGETHER else 3] * CALLS.get(case, 2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
