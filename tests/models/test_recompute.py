"""Recomputation changes what is kept for the backward pass, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalr.errors import UserError
from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from tests.models.settings import ALL_TARGETS, factorized, full_rank, low_rank, tiny

SHAPE = (3, 16)
METHODS = {"low_rank": low_rank(), "cola": factorized("cola")}
CONFIG = tiny(attention_bias=True, output_bias=True)


def _gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 101, SHAPE)
    decoder(ids, ids, 0.1).backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    return found


def _kept_bytes(decoder: Decoder) -> int:
    """Bytes that autograd keeps of the blocks between forward and backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(*SHAPE, CONFIG.hidden_size, requires_grad=True)
    rope = torch.ones(2, SHAPE[1], CONFIG.head_dim)
    alive = [x]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in decoder.blocks():
            alive.append(block(alive[-1], rope, None))
    return sum(kept.values())


@pytest.mark.parametrize("recompute", ["bottleneck", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_without_recomputation(method: str, recompute: str) -> None:
    expected = _gradients(build_decoder(CONFIG, METHODS[method], seed=3))
    decoder = build_decoder(CONFIG, METHODS[method], seed=3, recompute=recompute)
    found = _gradients(decoder)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("method", METHODS)
def test_compiled_recomputation_gives_the_same_gradients(method: str) -> None:
    expected = _gradients(build_decoder(CONFIG, METHODS[method], seed=3))
    decoder = build_decoder(CONFIG, METHODS[method], seed=3, recompute="bottleneck")
    for block in decoder.blocks():
        block.compile(dynamic=False, backend="aot_eager")
    for name, gradient in _gradients(decoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_what_is_kept_are_the_bottlenecks_and_two_vectors_a_token() -> None:
    method = low_rank(alpha=8.0)  # scale 1: no scaled copy of B
    everything = _kept_bytes(build_decoder(tiny(), method, seed=3))
    decoder = build_decoder(tiny(), method, seed=3, recompute="bottleneck")
    tokens, layers = SHAPE[0] * SHAPE[1], CONFIG.num_layers
    exact = 4 * tokens * layers * (2 * CONFIG.hidden_size + 7 * method.rank)
    assert _kept_bytes(decoder) == exact
    assert exact < everything / 3


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (full_rank(), "FullRankLinear"),
        (factorized("sltrain"), "SLTrainLinear"),
        (low_rank(targets=[t for t in ALL_TARGETS if t != "down"]), "FullRankLinear"),
    ],
)
def test_layers_without_bottleneck_are_refused(method: SimpleNamespace, layer: str) -> None:
    with pytest.raises(UserError, match=f"is a {layer} .method {method.name}.: use full or none"):
        build_decoder(tiny(), method, seed=3, recompute="bottleneck")
