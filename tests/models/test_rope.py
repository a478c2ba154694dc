"""Frequencies of rotary positions against transformers' own, and what a wrong pattern says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalr.config.model import RopeScaling
from megalr.errors import UserError
from megalr.kernels.attention import apply_rope
from megalr.models.build import build_decoder, sizes_of
from megalr.models.rope import rope_amplitude, rope_frequencies, rope_tables
from tests.models.settings import full_rank, run_of, tiny

CPU = torch.device("cpu")
LLAMA_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "linear", "factor": 4.0}, {}),
    ({"type": "llama3", "factor": 8.0, "original_max_positions": 8192, **LLAMA_3_1}, LLAMA_3_1),
    ({"type": "llama3", "factor": 32.0, "original_max_positions": 1024, **LLAMA_3_1}, LLAMA_3_1),
    ({"type": "yarn", "factor": 4.0, "original_max_positions": 32768}, {}),
    (
        {"type": "yarn", "factor": 16.0, "original_max_positions": 64, "truncate": False},
        {"truncate": False},
    ),
    (
        {
            "type": "yarn",
            "factor": 40.0,
            "original_max_positions": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.9,
        },
        {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9},
    ),
    (  # both ends of the ramp in one place
        {
            "type": "yarn",
            "factor": 2.0,
            "original_max_positions": 64,
            "beta_fast": 10.3,
            "beta_slow": 10.2,
        },
        {"beta_fast": 10.3, "beta_slow": 10.2},
    ),
]


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_scaled_frequencies_are_transformers(
    ours: dict[str, Any], theirs: dict[str, Any], width: int, theta: float
) -> None:
    values = {"rope_type": ours["type"], "factor": ours["factor"], "rope_theta": theta, **theirs}
    if "original_max_positions" in ours:
        values["original_max_position_embeddings"] = ours["original_max_positions"]
    config = LlamaConfig(
        hidden_size=4 * width, num_attention_heads=4, head_dim=width, rope_parameters=values
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[ours["type"]](config, CPU)
    scaling = RopeScaling.model_validate(ours)
    found = rope_frequencies(width, theta, scaling, CPU)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert rope_amplitude(scaling) == pytest.approx(amplitude)
    assert not torch.allclose(found, rope_frequencies(width, theta, None, CPU), rtol=1e-3)


def test_yarn_tables_carry_the_attention_factor() -> None:
    scaling = RopeScaling(type="yarn", factor=4.0, original_max_positions=64)
    plain = rope_tables(9, 8, 1e4, CPU, scaling) / (0.1 * math.log(4) + 1)
    torch.testing.assert_close((plain**2).sum(0), torch.ones(9, 8))


def test_a_part_of_a_head_is_rotated_by_complex_numbers() -> None:
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    tables = rope_tables(5, 8, 100.0, CPU).double()
    turned = torch.view_as_complex(torch.stack((x[..., :4], x[..., 4:8]), -1).contiguous())
    angles = torch.outer(torch.arange(5.0), 100.0 ** -(torch.arange(0, 8, 2) / 8)).double()
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, x[..., 8:]), -1)
    torch.testing.assert_close(apply_rope(x, tables), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_layers": (True, False, True)}, r"rope_layers has 3 values for 2 layers: give one"),
        ({"rope_layers": (True,) * 4}, "model.rope_layers has 4 values for 2 layers"),
        (
            {"sliding_window": 4, "window_layers": (True,) * 5},
            "model.window_layers has 5 values for 2 layers",
        ),
        ({"window_layers": (True, False)}, "model.window_layers is given without model.sliding_wi"),
        ({"head_dim": 7}, "7 of a head's 7 dimensions .* choose an even number above 0"),
        ({"partial_rotary_factor": 0.1}, "0 of a head's 8 dimensions"),
        ({"hidden_size": 50}, "50 is not a multiple of model.num_heads 6.*give model.head_dim"),
        (
            {"rope_theta": 1.0, "rope_scaling": RopeScaling.model_validate(CASES[3][0])},
            "model.rope_theta 1 .*yarn",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "'linear', 'llama3' or 'yarn'"),
        ({"type": "llama3", "factor": 2.0}, "needs original_max_positions and low_freq_factor"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3.0}, "does not use beta_fast"),
        ({"type": "linear", "factor": 0.5}, "greater than or equal to 1"),
        (
            {
                "type": "llama3",
                "factor": 2.0,
                "original_max_positions": 9,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            },
            "low_freq_factor 4 must be below high_freq_factor 4",
        ),
    ],
)
def test_scaling_that_is_unknown_or_incomplete_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RopeScaling.model_validate(values)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"max_positions": 31}, r"data\.sequence_length 32 is more than model\.max_positions 31"),
        ({"rope_layers": [True, False]}, r"model\.rope_layers is given with .* learned"),
        ({"partial_rotary_factor": 0.5}, r"model\.partial_rotary_factor is given with"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"model\.rope_scaling is given with"),
    ],
)
def test_learned_positions_that_do_not_fit_are_refused(model: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sizes_of(run_of({"preset": "gpt2_124m", **model}))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"learned needs model\.max_positions"):
        sizes_of(run_of({"preset": "llama_9m", "positions": "learned"}))


def test_a_sequence_longer_than_the_learned_positions_is_refused() -> None:
    sizes = tiny(positions="learned", norm="layernorm", max_positions=8)
    decoder = build_decoder(sizes, full_rank(), seed=0)
    with pytest.raises(UserError, match="9 tokens is longer than the model's 8 learned positions"):
        decoder(torch.zeros(1, 9, dtype=torch.int64))
