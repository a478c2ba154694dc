"""What --print_config says of a model: its sizes, its parameters; and that it is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from megalr.config import dump_config, load_run_config
from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.models.build import describe_parameters, sizes_of, with_sizes
from megalr.models.config import PRESETS
from megalr.run.folder import CONFIG, METRICS, check_run_folder
from tests.models.settings import run_of


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_filled_in_configuration_is_the_same_model(preset: str, tmp_path: Path) -> None:
    config = run_of({"preset": preset, "num_layers": 2, "sliding_window": 16})
    filled = with_sizes(config)
    (tmp_path / "run.yaml").write_text(dump_config(filled))
    again = load_run_config([tmp_path / "run.yaml"], presets=PRESETS)
    assert again == filled == with_sizes(filled)
    before, after = sizes_of(config), sizes_of(again)
    assert (before.kv_heads, before.head_width) == (after.num_kv_heads, after.head_dim)
    assert vars(after) == vars(before) | {
        "num_kv_heads": after.kv_heads,
        "head_dim": after.head_width,
    }
    no_null = {"rope_scaling", "rope_layers", "window_layers", "from_pretrained"}
    no_null |= {"max_positions"} if again.model.positions == "rope" else set()
    assert {name for name, value in again.model if value is None} == no_null


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def llama(*sizes: int, **others: Any) -> LlamaConfig:
    return LlamaConfig(**dict(zip(SIZES, sizes, strict=True)), **others)


def qwen3(*sizes: int, **others: Any) -> Qwen3Config:
    return Qwen3Config(**dict(zip(SIZES, sizes, strict=True)), head_dim=128, **others)


def printed_counts(config: RunConfig) -> list[int]:
    words = describe_parameters(config).replace(",", "").replace(";", "").split()
    return [int(word) for word in words if word.isdigit()]


@pytest.mark.parametrize(
    ("preset", "there"),
    [
        ("llama_60m", llama(32000, 512, 1376, 8, 8)),
        (
            "llama3_8b",
            llama(128_256, 4096, 14336, 32, 32, num_key_value_heads=8),
        ),
        (
            "qwen3_0.6b",
            qwen3(151_936, 1024, 3072, 28, 16, num_key_value_heads=8, tie_word_embeddings=True),
        ),
        ("gpt2_124m", GPT2Config()),  # the defaults are the published model's
    ],
)
def test_parameters_are_as_many_as_transformers_has(preset: str, there: Any) -> None:
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(there).num_parameters()
    assert printed_counts(run_of({"preset": preset})) == [expected, expected]


def test_frozen_matrices_are_counted_but_not_trained() -> None:
    config = run_of({"preset": "llama_9m"}, {"name": "lora", "rank": 4})
    total, trained = printed_counts(config)
    h, f, layers = 128, 352, 4
    assert total - trained == layers * (4 * h * h + 3 * h * f)
    # A of q, k, v, o and of gate, up reads h, that of down f; every matrix has a B.
    factors = layers * 4 * (4 * 2 * h + 3 * (h + f))
    assert trained == 2 * 32000 * h + (2 * layers + 1) * h + factors


def test_a_run_goes_on_from_its_printed_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_of({"preset": "llama_9m"})
    folder = Path(config.run.dir)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_config(config))
    (folder / METRICS).write_text('{"event": "step"}\n')
    assert check_run_folder(with_sizes(config), resolve=with_sizes) == []
    wider = with_sizes(run_of({"preset": "llama_9m", "hidden_size": 256}))
    with pytest.raises(UserError, match=r"model\.hidden_size: 128 there, 256 here"):
        check_run_folder(wider, resolve=with_sizes)


def test_sizes_of_a_pretrained_model_are_not_guessed() -> None:
    config = run_of({"from_pretrained": "models/elsewhere"})
    assert with_sizes(config) is config and describe_parameters(config) == ""
