"""Counts of parameters and FLOPs against torch's own counter and independent sums."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalr.models.build import build_decoder
from megalr.models.flops import flops_per_token, matrix_parameters, parameter_count
from tests.models.settings import GPT2, factorized, full_rank, low_rank, tiny


@pytest.mark.parametrize("method", [full_rank(), low_rank()], ids=["full_rank", "low_rank"])
def test_matrix_flops_equal_torchs_count_of_the_forward_pass(method: object) -> None:
    config = tiny(num_kv_heads=None, pad_multiple=1)
    decoder = build_decoder(config, method, seed=0)
    ids = torch.zeros(1, 40, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(ids)
    counted = counter.get_flop_counts()["Global"]
    names = ("mm", "up_project")  # the products with B are one custom operator
    matrices = sum(v for op, v in counted.items() if any(name in str(op) for name in names))
    assert matrices == 2 * matrix_parameters(decoder) * 40


@pytest.mark.parametrize(
    "method",
    [full_rank(), low_rank(), factorized("cola"), factorized("lora")],
    ids=lambda m: m.name,
)
def test_training_flops_equal_torchs_count_of_both_passes(method: object) -> None:
    decoder = build_decoder(tiny(num_kv_heads=None, pad_multiple=1), method, seed=0)
    ids = torch.zeros(1, 40, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        decoder(ids, ids).backward()
    counted = counter.get_flop_counts()["Global"]
    names = ("mm", "up_project")
    matrices = sum(v for op, v in counted.items() if any(name in str(op) for name in names))
    attention = 3 * decoder.config.num_layers * 4 * decoder.config.hidden_size * 41 / 2
    assert matrices == pytest.approx(40 * (flops_per_token(decoder, 40) - attention))


def test_attention_of_wide_heads_and_windows_in_some_layers() -> None:
    S = 12
    config = tiny(num_layers=4, head_dim=20, sliding_window=5, window_layers=(True, False))
    decoder = build_decoder(config, full_rank(), seed=0)
    pairs = [sum(min(t + 1, window) for t in range(S)) for window in (5, S, 5, S)]
    attention = sum(2 * 2 * 6 * 20 * each / S for each in pairs)
    expected = 3 * (2 * matrix_parameters(decoder) + attention)
    assert flops_per_token(decoder, S) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 20},
        {"qk_norm": "head", "head_dim": 10},
        {"qk_norm": "full", "norm_order": "post"},
        {"rope_layers": (True, False), "partial_rotary_factor": 0.5},
        {**GPT2, "max_positions": 40},
    ],
    ids=lambda changes: "-".join(changes)[:20],
)
@pytest.mark.parametrize("method", [full_rank(), low_rank()], ids=lambda method: method.name)
def test_matrices_of_other_blocks_equal_torchs_count(method: object, changes: dict) -> None:
    config = tiny(**{"num_kv_heads": None, "pad_multiple": 1, **changes})
    decoder = build_decoder(config, method, seed=0)
    ids = torch.zeros(1, 40, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        decoder(ids, ids).backward()
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(v for op, v in counted.items() if any(n in str(op) for n in ("mm", "up_proj")))
    attention = 3 * config.num_layers * 4 * config.num_heads * config.head_width * 41 / 2
    assert matrices == pytest.approx(40 * (flops_per_token(decoder, 40) - attention))


def test_attention_counts_what_causal_masking_and_the_window_keep() -> None:
    S = 12
    for window in (None, 5):
        decoder = build_decoder(tiny(sliding_window=window), full_rank(), seed=0)
        pairs = sum(min(t + 1, window or S) for t in range(S))
        per_layer = 2 * 2 * decoder.config.hidden_size * pairs / S  # scores and weighted sum
        expected = 3 * (2 * matrix_parameters(decoder) + decoder.config.num_layers * per_layer)
        assert flops_per_token(decoder, S) == pytest.approx(expected)


@pytest.mark.parametrize(
    "method",
    [full_rank(), low_rank(), *(factorized(name) for name in ("sltrain", "lora", "cola"))],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "attention_bias": True},
        {"head_dim": 10, "qk_norm": "head"},
        {"head_dim": 10, "qk_norm": "full", "norm_order": "post"},
    ],
)
def test_parameter_count_is_that_of_the_unpadded_model(method: object, changes: dict) -> None:
    padded = build_decoder(tiny(pad_multiple=32, **changes), method, seed=0)
    bare = build_decoder(tiny(pad_multiple=1, **changes), method, seed=0)
    assert parameter_count(padded) == sum(p.numel() for p in bare.parameters())
    assert parameter_count(padded) < sum(p.numel() for p in padded.parameters())
    trained = sum(p.numel() for p in bare.parameters() if p.requires_grad)
    assert parameter_count(padded, trainable_only=True) == trained
