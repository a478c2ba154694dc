"""Activation checkpointing changes only which results are kept for the backward pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalr.errors import UserError
from megalr.models.build import build_decoder
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder
from megalr.models.recompute import LEVELS
from tests.models.settings import ALL_TARGETS, GPT2, factorized, full_rank, low_rank, tiny

SHAPE = (3, 16)
METHODS = {"low_rank": low_rank(), "cola": factorized("cola")}
CONFIG = tiny(attention_bias=True, output_bias=True)


def _gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 101, SHAPE)
    (decoder(ids, ids) * 0.1).backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    return found


def _kept_numbers(decoder: Decoder) -> int:
    """Numbers per token and block that compiled blocks keep for backward, weights aside.

    The float32 number per token and head that attention keeps is not counted.
    """
    torch._dynamo.reset()  # it stops compiling a function that it has compiled too often
    decoder.bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        of_tokens = tensor.numel() >= SHAPE[0] * SHAPE[1] and tensor.shape[0] != 2  # not rope
        if storage.data_ptr() not in weights and of_tokens and tensor.dtype == torch.bfloat16:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(*SHAPE, CONFIG.hidden_size, requires_grad=True, dtype=torch.bfloat16)
    rope = torch.ones(2, SHAPE[1], CONFIG.head_width)
    alive = [(x, torch.zeros_like(x))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in decoder.blocks():
            block.compile(dynamic=False, backend="aot_eager_decomp_partition")
            x, added = alive[-1]
            alive.append(block(x, rope, None, added))
    return sum(kept.values()) // (2 * SHAPE[0] * SHAPE[1] * CONFIG.num_layers)


@pytest.mark.parametrize("recompute", LEVELS[1:])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_without_recomputation(method: str, recompute: str) -> None:
    expected = _gradients(build_decoder(CONFIG, METHODS[method], seed=3))
    decoder = build_decoder(CONFIG, METHODS[method], seed=3, recompute=recompute)
    found = _gradients(decoder)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("recompute", LEVELS[1:])
@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head", "head_dim": 16, "rope_layers": (True, False)},
        {"qk_norm": "full", "norm_order": "post"},
        {"partial_rotary_factor": 0.5, "sliding_window": 5, "window_layers": (False, True)},
        {**GPT2, "tie_embeddings": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_gradients_of_other_families_are_those_without_recomputation(
    changes: dict, recompute: str
) -> None:
    expected = _gradients(build_decoder(tiny(**changes), low_rank(), seed=3))
    found = _gradients(build_decoder(tiny(**changes), low_rank(), seed=3, recompute=recompute))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("config", [CONFIG, tiny(**GPT2)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("recompute", ["elementwise", "bottleneck"])
def test_compiled_recomputation_gives_the_same_gradients(
    recompute: str, config: DecoderConfig
) -> None:
    expected = _gradients(build_decoder(config, METHODS["low_rank"], seed=3))
    decoder = build_decoder(config, METHODS["low_rank"], seed=3, recompute=recompute)
    for block in decoder.blocks():
        block.compile(dynamic=False, backend="aot_eager_decomp_partition")
    for name, gradient in _gradients(decoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_kept(level: str) -> None:
    """Numbers per token and block; heads of q, k, v are as many here, the MLP is padded."""
    config = tiny(num_kv_heads=None, pad_multiple=16)
    method = low_rank()
    h, f, r = config.hidden_size, config.padded_intermediate_size, method.rank
    exact = {
        # x, two normalized x, q, k, v, attention, x between the halves; gate, up, their product
        "none": 8 * h + 3 * f + 7 * r,
        # x, q, k, v, attention, what it adds to x; gate, up
        "elementwise": 6 * h + 2 * f + 7 * r,
        "mlp": 5 * h + 7 * r,
        "bottleneck": h + 7 * r,
        "full": h,
    }
    assert _kept_numbers(build_decoder(config, method, seed=3, recompute=level)) == exact[level]


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (full_rank(), "DenseLinear"),
        (factorized("sltrain"), "SLTrainLinear"),
        (low_rank(targets=[t for t in ALL_TARGETS if t != "down"]), "DenseLinear"),
    ],
)
def test_layers_without_bottleneck_are_refused(method: SimpleNamespace, layer: str) -> None:
    with pytest.raises(UserError, match=f"is a {layer} .method {method.name}.: use none, el"):
        build_decoder(tiny(), method, seed=3, recompute="bottleneck")


def test_elementwise_is_refused_where_it_would_keep_more() -> None:
    with pytest.raises(UserError, match="keeps both products of a lora layer"):
        build_decoder(tiny(), factorized("lora"), seed=3, recompute="elementwise")
