"""Padding changes nothing and stays zero; initial weights depend on names and global sizes."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from megalr.errors import UserError
from megalr.hf.names import dense_state_dict, dense_tensors
from megalr.layers.factors import LinearShape
from megalr.layers.linear import DenseLinear, FactorizedLinear
from megalr.layers.low_rank import LowRankLinear
from megalr.models.build import build_decoder
from megalr.models.config import PRESETS, decoder_config
from megalr.models.decoder import Decoder
from megalr.models.flops import parameter_count
from tests.models.settings import factorized, full_rank, low_rank, tiny

METHODS = {
    "full_rank": full_rank(),
    "low_rank": low_rank(),
    **{name: factorized(name) for name in ("sltrain", "lora", "cola")},
}


def _padding(decoder: Decoder) -> list[torch.Tensor]:
    """Every stored number that is padding."""
    config = decoder.config
    parts = [decoder.embedding.weight[config.vocab_size :]]
    parts.append(decoder.head.weight[config.vocab_size :])
    for linear in decoder.linears():
        shape = linear.shape
        rows = linear.b if isinstance(linear, FactorizedLinear) else linear.weight
        columns = linear.a if isinstance(linear, FactorizedLinear) else linear.weight
        parts.append(columns[:, shape.in_used :])
        for (start, stop), used in zip(shape.row_ranges(), shape.out_used, strict=True):
            parts.append(rows[start + used : stop])
    return parts


@pytest.mark.parametrize("method", METHODS)
def test_padding_keeps_the_function_and_stays_exactly_zero_through_training(method: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 101, (4, 12))
    losses: dict[int, list[float]] = {}
    for multiple in (1, 32):
        decoder = build_decoder(tiny(pad_multiple=multiple), METHODS[method], seed=5)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.02, weight_decay=0.1)
        losses[multiple] = []
        for _ in range(5):
            loss = decoder(ids, ids.roll(-1, 1)) / ids.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[multiple].append(loss.item())
    assert sum(part.numel() for part in _padding(decoder)) > 3000
    assert all(torch.count_nonzero(part) == 0 for part in _padding(decoder))
    assert losses[32] == pytest.approx(losses[1], abs=1e-5)
    assert losses[1][-1] < losses[1][0] - 0.5


def test_weights_depend_on_seed_and_name_not_on_padding_or_depth() -> None:
    first = dense_state_dict(build_decoder(tiny(num_layers=3), low_rank(), seed=1))
    second = dense_state_dict(build_decoder(tiny(pad_multiple=1), low_rank(), seed=1))
    other = dense_state_dict(build_decoder(tiny(), low_rank(), seed=2))
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, atol=0, rtol=0)
        assert "norm" in name or not torch.equal(other[name], tensor)


def test_loro_is_a_low_rank_model_with_xavier_factors_and_no_scale() -> None:
    decoder = build_decoder(tiny(hidden_size=480, num_heads=6), factorized("loro", 64), seed=0)
    layer = decoder.blocks()[0].attention.o
    assert isinstance(layer, LowRankLinear) and layer.scale == 1.0
    assert layer.a.std().item() == pytest.approx(math.sqrt(2 / (64 + 480)), rel=0.03)
    assert layer.b.std().item() == pytest.approx(math.sqrt(2 / (64 + 480)), rel=0.03)
    assert len(decoder.factor_pairs()) == 14


@pytest.mark.parametrize("m, n", [(600, 300), (300, 600)])
def test_init_variances_are_the_documented_ones(m: int, n: int) -> None:
    rank, alpha, std = 64, 16.0, 0.02
    shape = LinearShape(("w",), n, (m,), n, (m,))
    published = LowRankLinear(shape, rank, alpha, "kaiming")
    published.reset_parameters(0, std)
    expected = alpha / rank / math.sqrt(9 * n)
    assert float(published.dense_weight(0).std()) == pytest.approx(expected, rel=0.03)
    assert published.a.abs().max().item() == pytest.approx(1 / math.sqrt(n), rel=1e-3)

    same = LowRankLinear(shape, rank, alpha, "full_rank_variance")
    same.reset_parameters(0, std)
    assert float(same.dense_weight(0).std()) == pytest.approx(std, rel=0.03)
    # Balanced in expectation: the factors have equal norms.
    assert same.a.norm().item() == pytest.approx(same.b.norm().item(), rel=0.03)


def test_preset_sizes_are_the_published_parameter_counts() -> None:
    published = {"llama_60m": 58.074, "llama_130m": 134.106, "llama_350m": 367.969}
    for preset, millions in published.items():
        with torch.device("meta"):
            decoder = Decoder(decoder_config(preset, {"pad_multiple": 1}), DenseLinear)
        assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(
            millions, abs=5e-4
        )
    assert PRESETS["llama_1b"].padded_intermediate_size == 5504


@pytest.mark.parametrize(
    ("preset", "kind", "values"),
    [
        (
            "llama3_8b",
            "LlamaConfig",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
        ),
        (
            "qwen3_0.6b",
            "Qwen3Config",
            {
                "vocab_size": 151936,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": True,
            },
        ),
        (
            "qwen3_1.7b",
            "Qwen3Config",
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": True,
            },
        ),
    ],
)
def test_presets_have_the_tensors_of_the_published_models(
    preset: str, kind: str, values: dict
) -> None:
    with torch.device("meta"):
        decoder = Decoder(decoder_config(preset, {"pad_multiple": 1}), DenseLinear)
        settings = getattr(transformers, kind)(**values)
        published = transformers.AutoModelForCausalLM.from_config(settings)
    published.tie_weights()
    found = {name: tensor.shape for name, tensor in dense_tensors(decoder)}
    assert found == {name: tensor.shape for name, tensor in published.named_parameters()}
    assert parameter_count(decoder) == sum(p.numel() for p in published.parameters())


def test_bad_sizes_are_one_line_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"did you mean llama_60m\?"):
        decoder_config("llama_60n", {})
    with pytest.raises(UserError, match=r"rank 49 is larger than 16.*at most 16"):
        build_decoder(tiny(), low_rank(rank=49), seed=0)
    with pytest.raises(UserError, match="name all of them or none"):
        build_decoder(tiny(), low_rank(targets=["q", "down"]), seed=0)
    with pytest.raises(UserError, match=r"hidden_size 48 is not a multiple of model.num_heads 7"):
        tiny(num_heads=7)
