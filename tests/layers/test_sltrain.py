"""Memory that an SLTrain layer keeps for the backward pass, compiled or not, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.layers.factors import LinearShape
from megalr.layers.sltrain import SLTrainLinear

TOKENS, SIZE = 6, 64
SHAPE = LinearShape(("x.gate", "x.up"), SIZE, (SIZE, SIZE), SIZE, (SIZE, SIZE))


def _layer(alpha: float) -> SLTrainLinear:
    layer = SLTrainLinear(SHAPE, 4, alpha, 0.05, seed=0)
    layer.reset_parameters(0, 0.02)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.b)
    return layer


def _gradients(layer: SLTrainLinear, forward, x: Tensor) -> list[Tensor]:
    first, second = forward(x)
    loss = (first.sin() * second).sum()
    return list(torch.autograd.grad(loss, [x, *layer.parameters()]))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_are_input_and_parameters(compiled: bool) -> None:
    """Neither W, of which torch.compile would keep what it can see, nor a scaled copy of A."""
    layer = _layer(alpha=2.0)
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x = torch.randn(TOKENS, SIZE, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(x)  # alive, so that no address is used twice
    inputs = (x, layer.a, layer.b, layer.values, layer.support)
    assert kept == {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inputs}
    assert len(outputs) == 2


def test_compiled_gradients_are_those_without_compilation() -> None:
    layer = _layer(alpha=6.0)
    x = torch.randn(2, 3, SIZE, requires_grad=True)
    expected = _gradients(layer, layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    for found, wanted in zip(_gradients(layer, compiled, x), expected, strict=True):
        assert torch.equal(found, wanted)


def test_recomputation_gives_the_same_gradients() -> None:
    layer = _layer(alpha=2.0)
    x = torch.randn(TOKENS, SIZE, requires_grad=True)

    def recomputed(values: Tensor) -> tuple[Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(layer, values, use_reentrant=False)

    expected = _gradients(layer, layer, x)
    for found, wanted in zip(_gradients(layer, recomputed, x), expected, strict=True):
        assert torch.equal(found, wanted)


def test_matrices_beyond_int32_positions_are_refused() -> None:
    shape = LinearShape(("x.up",), 2**15, (2**16,), 2**15, (2**16,))
    refused = pytest.raises(UserError, match=r"x.up: .* not 2147483648: raise parallel.tensor")
    with torch.device("meta"), refused:
        SLTrainLinear(shape, 1, 1.0, 0.1, seed=0)
